"""What tierstore is measured beside, one yardstick a file, each in its best form."""

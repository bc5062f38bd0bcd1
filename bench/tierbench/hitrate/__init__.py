"""`tierbench hitrate`: what a DRAM budget buys on somebody's own text."""

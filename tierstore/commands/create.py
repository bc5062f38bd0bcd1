"""`tierstore create`: tables that are to be trained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest
from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.format.sources import MODELS

LAYERS = (1, 15)  # of the published demo

EPILOG = """\
examples:
  tierstore create DIR --table words:1000000:64 --optimizer adam --learning-rate 1e-3
  tierstore create DIR --model engram-demo --tokenizer tokenizer.json --layers 1,15 \\
      --vocab-size 64000,64000 --heads 8 --dim 64 --dtype bfloat16 --optimizer engram
  tierstore create DIR --from SERVED --optimizer adam               train on from tables that are packed
  tierstore create DIR --from CHECKPOINT --table words --as mine    or from one of a checkpoint
  tierstore create DIR0 --table words:1000000:64 --share 0/2        one of two ranks' rows

Rows take no disk until they are trained. Those of --from a store directory are linked, not copied, where
both lie on one file system; those of a checkpoint are packed first, and a create that was killed goes on
where it stopped. Then serve them: tierstore serve DIR --train ..., or
open them in the trainer's own process: connect("local:DIR").training().
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="store directory; made where there is none")
    add(
        "--table",
        action="append",
        default=[],
        metavar="NAME:ROWS:DIM",
        help="a new table; may be repeated. With --from, a NAME alone chooses one of those",
    )
    add("--from", dest="origin", type=Path, metavar="SOURCE",
        help="begin with tables of a store directory, or of a checkpoint, as `pack` reads it")  # fmt: skip
    add("--as", dest="name", metavar="NAME", help="what one table of --from is called (default: as there)")
    add("--layout", type=Path, metavar="FILE", help="of a checkpoint: describes a plain [rows, dim] tensor")
    add("--model", choices=[m for m in MODELS if m != "auto"],
        help="engram-demo: new tables with that model's hashing, one a layer. With --from: whose checkpoint "
        "it is (default: by its tensors' names)")  # fmt: skip
    add("--tokenizer", type=Path, metavar="FILE", help="of the model: its tokenizer.json")
    add("--layers", type=_numbers, metavar="L,L", help="of the model (default: 1,15; with --from: all)")
    add("--vocab-size", type=_numbers, metavar="N,N", help="of the model: least rows a head, for each order")
    add("--heads", type=int, default=8, help="of the model: heads of an order (default: %(default)s)")
    add("--pad-id", type=int, default=2, help="of the model: a raw token id (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the hashing and of initial rows (default: %(default)s)")
    add("--dim", type=int, help="of the model: elements of a row")
    add(
        "--optimizer",
        default="adam",
        help="adam, adagrad, rowwise_adagrad, sgd, or engram: the paper's recipe",
    )
    add(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="of the optimizer, as beta2=0.99",
    )
    add("--learning-rate", type=float, help="of updates that give none")
    add("--weight-decay", type=float, help="decoupled, of rows that are updated (default: 0)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights (default: %(default)s)",
    )
    add("--no-master", action="store_true", help="bfloat16 weights without a float32 master")
    add(
        "--initial-std",
        type=float,
        default=0.0,
        help="rows begin normal with this deviation (default: zeros)",
    )
    add("--share", type=_share, metavar="RANK/WORLD", help="keep one rank's share, for sharded training")
    add("--json", action="store_true", help="tell the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Makes the tables and says what they are."""
    from tierstore.training.creating import NewTable, Origin, create_training

    picked = [text for text in args.table if args.origin and ":" not in text]
    tables = [NewTable(*_table(text)) for text in args.table if text not in picked]
    origin = None
    if args.origin:
        origin = Origin(args.origin, tuple(picked), args.name, args.layers, args.model or "auto", args.layout,
                        args.tokenizer)  # fmt: skip
    elif args.name or args.layout:
        raise BadRequest("--as and --layout are of tables that there are already; give --from as well")
    elif args.model:
        tables += _model_tables(args)
    given = {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    recipe = {name: value for name, value in given.items() if value is not None}
    settings = dict(_setting(text) for text in args.setting)
    with progress_display(quiet=args.quiet) as (notify, on_progress):
        specs = create_training(
            args.directory, tables, optimizer=args.optimizer, settings=settings, dtype=args.dtype,
            master=not args.no_master, initial_std=args.initial_std, seed=args.seed, share=args.share,
            origin=origin, notify=notify, on_progress=on_progress, **recipe,
        )  # fmt: skip
    if args.json:
        json.dump({"tables": [_as_json(spec) for spec in specs]}, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_sentence(spec) for spec in specs))
    return 0


def _model_tables(args: argparse.Namespace) -> list[Any]:
    from tierstore.training.creating import engram_tables

    if args.model != "engram-demo":
        raise BadRequest(
            f"new tables have the hashing of engram-demo, got --model {args.model}; give --from as well"
        )
    if args.tokenizer is None or args.vocab_size is None or args.dim is None:
        raise BadRequest(f"--model {args.model} needs --tokenizer, --vocab-size and --dim")
    return list(engram_tables(
        args.tokenizer, layer_ids=args.layers or LAYERS, vocab_size_per_ngram=args.vocab_size,
        heads=args.heads, pad_id=args.pad_id, seed=args.seed, dim=args.dim,
    ))  # fmt: skip


def _as_json(spec: Any) -> dict[str, Any]:
    fields = [f"{f.name} {f.dtype} x {f.count}" for f in spec.layout.fields]
    return {
        "name": spec.name, "rows": spec.rows, "row_bytes": spec.row_bytes, "fields": fields,
        "optimizer": spec.optimizer, "begins_with": spec.initial.generation or spec.initial.kind,
        "share": f"{spec.partition.rank}/{spec.partition.world}" if spec.partition else None,
    }  # fmt: skip


def _sentence(spec: Any) -> str:
    fields = ", ".join(f"{f.name} {f.dtype} x {f.count}" for f in spec.layout.fields)
    full = readable_bytes(spec.rows * spec.row_bytes)
    share = f", share {spec.partition.rank}/{spec.partition.world}" if spec.partition else ""
    rows = f"{spec.rows} rows of {spec.row_bytes} bytes ({fields})"
    begins = f", begins with generation {spec.initial.generation}" if spec.initial.generation else ""
    return f"{spec.name}{share}: {rows}, {full} once all are trained{begins}"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, got {text!r}") from None


def _share(text: str) -> tuple[int, int]:
    rank, _, world = text.partition("/")
    if not rank.isdecimal() or not world.isdecimal() or int(rank) >= int(world):
        raise argparse.ArgumentTypeError(f"expected RANK/WORLD, such as 0/4, got {text!r}")
    return int(rank), int(world)


def _table(text: str) -> tuple[str, int, int]:
    name, _, sizes = text.partition(":")
    rows, _, dim = sizes.partition(":")
    if not name or not rows.isdecimal() or not dim.isdecimal():
        raise BadRequest(f"--table {text}: expected NAME:ROWS:DIM, such as words:1000000:64")
    return name, int(rows), int(dim)


def _setting(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise BadRequest(f"--setting {text}: expected NAME=NUMBER, such as beta2=0.99") from None

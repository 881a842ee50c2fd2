"""What the commands are for and what they take, beside dotted.path=value."""

from typing import Any

COMMANDS = {
    "train": "train an experiment, and the parents and data that it lacks; resumes what was broken",
    "frontier": "train the members of FRONTIER, or one run for every value of a list, and compare",
    "sweep": "train the members of SWEEP, or a run for every combination of lists of values, and "
    "compare their last evaluations, seeds averaged",
    "eval": "print the last evaluation of a finished run",
    "sample": "print responses of a finished run, or of a model folder in its place, to "
    "evaluation.prompts, a JSON line each; without any (or with -) to what is piped in, a prompt a "
    "line, or to what is typed, line by line until Ctrl-D",
    "inspect": "show what the model will see of the data, token by token, and write it as a page",
    "plan": "compile the train step ahead of time, for TPUs that are not here or for the devices "
    "that are, and print what it needs of each: memory, flops, time, collectives",
    "score": "score every response in files of records by a finished run, or by a model folder in "
    "its place, and print how often chosen ones are above rejected ones, and how well the margins "
    "say so",
    "export": "write a finished run as a folder that transformers' from_pretrained reads",
}
READERS = ("eval", "sample", "score", "export")  # of finished runs, see commands.py
EITHER = "a file or a module name; or a folder of Hugging Face, or owner/name on the hub"
WHAT = {"sample": EITHER, "score": EITHER}
WORDS = {
    "score": [
        ("FILE", "records to score, in any form that data.source takes; evaluation.source if none")
    ],
    "export": [("FOLDER", "where to write, a new or empty folder")],
}
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "sample": {
        "--chat": {
            "action": "store_true",
            "help": "what is typed or piped in are messages of a user; that is so by itself where "
            "the tokenizer has a chat template and the run's data were conversations (a folder: "
            "where it has one)",
        },
        "--text": {"action": "store_true", "help": "what is typed or piped in is plain text"},
        "--best-of": {
            "type": int,
            "default": 1,
            "metavar": "N",
            "help": "print of every N responses the one that the first of evaluation.rewards puts "
            "highest (1)",
        },
    },
    "score": {
        "--reference": {
            "metavar": "FOLDER",
            "help": "compare with this model folder or hub name, in place of a run's reference",
        },
        "--reference-free": {"action": "store_true", "help": "leave a run's reference out"},
        "--per-token": {"action": "store_true", "help": "divide by the number of tokens"},
        "--plain": {
            "action": "store_true",
            "help": "read the files without the run's data.layout and data.arrange",
        },
        "--row-tokens": {
            "type": int,
            "metavar": "N",
            "help": "in place of data.row_tokens: records longer than that are dropped or cut",
        },
        "--subset": {
            "metavar": "FIELD",
            "help": "the field that names a record's subset (subset; of several files, the file)",
        },
        "--out": {"metavar": "FILE", "help": "write a JSON line a record: scores, lengths, subset"},
        "--json": {"metavar": "FILE", "help": "write the table as JSON"},
        "--figure": {
            "metavar": "FILE",
            "help": "draw how often pairs are in order against sigmoid of their margin, as PNG",
        },
    },
    "inspect": {
        "--rows": {"type": int, "default": 3, "help": "groups shown of each source (3)"},
        "--record": {"type": int, "help": "show this record of data.source, in full"},
        "--ids": {"action": "store_true", "help": "show the id of every token"},
        "--html": {"metavar": "FILE", "help": "the page; runs/<run>-inspect.html if none"},
    },
    "plan": {
        "--topology": {
            "metavar": "NAMES",
            "help": "TPUs, as v5e:4x4, or several: v5e:4x4,v5p:2x2x2; the devices here if none",
        },
        "--rows": {
            "type": int,
            "metavar": "N",
            "help": "rows of data.row_tokens in a step, in place of those that the data make",
        },
        "--json": {"metavar": "FILE", "help": "write the plans as JSON"},
    },
    "export": {
        "--dtype": {
            "choices": ("float32", "bfloat16"),
            "default": "float32",
            "help": "of the weights (float32)",
        },
        "--adapter": {
            "action": "store_true",
            "help": "of a run with lora, the adapter alone, as peft loads it; else it is merged",
        },
    },
}
LOSSES = (
    "list every loss: name, formula, paper, needs; `losses kl` for what the KL estimators estimate"
)

"""`agentark traces`: what is in a trace store, what it cost, whether it is whole; stores exported and merged."""

import asyncio
import json
import re
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentark_jax.errors import UsageError, plain
from agentark_jax.files import write_json
from agentark_jax.progress import Display
from agentark_jax.records import DEBATE, DEBATER, Label, Turn, Verdict
from agentark_jax.tasks.config import FieldsConfig
from agentark_jax.tasks.grading import GRADERS, grader
from agentark_jax.tasks.grading.bertscore import NAME, BERTScore
from agentark_jax.tasks.grading.short import SCORES
from agentark_jax.tasks.rows import read_file
from agentark_jax.tools import Parser
from agentark_jax.traces import exchange
from agentark_jax.traces.audit import Group, agreement, read_labelled, scores_by_group
from agentark_jax.traces.config import SelectionConfig, Variant
from agentark_jax.traces.foreign import read_debate, turns_of
from agentark_jax.traces.judge import Judge, judge_store, to_judge, undecided, with_fallback
from agentark_jax.traces.labels import label_store, labelled_turns
from agentark_jax.traces.matching import match
from agentark_jax.traces.selection import check_filled, save_selection
from agentark_jax.traces.store import LEDGER, OnTurns, TraceStore, Usage
from agentark_jax.traces.variants import possible, select

_TRACES = """\
Read, check, export and merge trace stores: every model call of a run, with what it said and what it took.

STORE is a store's file or the directory of a run. Reading disturbs no run that is writing.

  agentark traces stats runs/quickstart --prices 0.30,0.03,1.20
  agentark traces show runs/quickstart 3fa9 --tokenizer runs/quickstart/model
  agentark traces export runs/quickstart --parquet s3://bucket/traces
  agentark traces merge all.sqlite worker-0 worker-1 s3://bucket/traces
  agentark traces verify all.sqlite
  agentark traces audit --grader numeric --labelled solutions.jsonl
  agentark traces import debates.jsonl debates.sqlite --model gpt-4o --tokenizer DIR --rounds responses
  agentark traces label debates.sqlite --grader numeric
  agentark traces select debates.sqlite --grader numeric --out selected
  agentark traces telemetry debates.sqlite --grader numeric
"""
_STATS = """\
Count calls, failed attempts, tokens and seconds, and say what they cost.

Calls are those that were answered; a failed attempt has no tokens. Cached tokens are some of the prompt tokens. Seconds
are those of every call by itself: calls that ran side by side count side by side.

  agentark traces stats runs/quickstart --by protocol,agent
  agentark traces stats runs/quickstart --by question_id --prices 0.30,0.03,1.20
"""
_SHOW = """\
Print the attempts of one call: what was asked, what was said, what it took.

KEY is the beginning of the call's key; if several calls begin with it, their keys are listed. Without a tokenizer the
prompt is printed as token ids, a segment to a line. Control characters of what a model said are left out.
"""
_EXPORT = """\
Write a whole store to Parquet files, or its turns to one file that equal runs make byte for byte the same.

--parquet loses nothing: `agentark traces merge` makes a store of it again. The URL is a directory, here or anywhere
that fsspec knows (s3://, gs://, hf://, ...). --canonical writes JSON lines sorted by key, without times and cached
usage.
"""
_MERGE = """\
Add stores, and Parquet exports, to the store OUT, which is made when missing.

Each source is added whole or not at all, and every row of it is checked. What OUT already has is skipped, so the
command may be repeated. Two different answers to one call, or a question or label that differs, are an error: such
stores are no parts of one run. Where stores have different failed attempts of a call, these are numbered anew in order
of time.

  agentark traces merge runs/all/traces.sqlite runs/worker-0 runs/worker-1
"""
_VERIFY = """\
Check a store against its own hashes: the keys of all calls, every answer, id-segment, question and label.

Exit code 0 when all is as it was recorded, 1 with a line for each thing that is not.
"""

_IMPORT = """\
Add debates that others held to the store OUT, which is made when missing; then label them and select from them.

FILE (.jsonl, .json, .gz of these, .parquet) has a debate a row: a question, its gold answer, perhaps choices, and lists
of texts, one for each round, with a text for each agent. Options say in which columns; a dotted path goes into objects
and lists. The texts are encoded once with the tokenizer of the student-to-be, and marked as text alone. The command may
be repeated.

  agentark traces import debates.jsonl debates.sqlite --model gpt-4o --tokenizer Qwen/Qwen3-0.6B --rounds responses
  agentark traces label debates.sqlite --grader numeric
  agentark traces select debates.sqlite --grader numeric --out selected
"""
_LABEL = """\
Grade every answered turn of a store and keep the labels, beside those of other graders. Labels can be made anew at any
time; no turn is touched.

With --judge a model (a directory or a hub id) is told question, right answers and the end of a solution, and says true
or false of the turns that the grader cannot read, and of some that it can. It has labels of its own; those of both, the
judge's where the grader cannot read, have an id that joins theirs with "+". With --blind it is a verifier: it is told
no right answer and judges all turns. What it says is kept at once; the same command again asks about what is missing.

  agentark traces label runs/quickstart --grader numeric --judge Qwen/Qwen3-0.6B
  agentark traces label runs/quickstart --grader numeric --judge DIR --servers http://127.0.0.1:30000
  agentark traces select runs/quickstart --grader numeric-2+judge --out selected
  agentark traces label runs/quickstart --grader numeric --judge DIR --blind
  agentark traces select runs/quickstart --grader verifier --out selected-blind
"""
_SELECT = """\
Choose training trajectories among the labelled turns of a store's debates, and write a Parquet file for each variant
and, beside them, manifest.json: trajectories, tokens, questions and what each filter kept and dropped. `summary` is
possible where a summariser spoke. A trajectory of `dialogue` names the turns that it tells. With --match the manifest
says how alike the variants are, and how many questions that took. Of a run it is the debate that students learn from,
without its controls and held-out questions.

  agentark traces select runs/quickstart --grader final_answer --variant corrective_only --out selected
  agentark traces select theirs.sqlite --grader choice --variant final_only --variant round1_only --match --out twins
"""

_AUDIT = """\
Compare graders with labels that others gave, and with each other; or all labels in a store with each other.

FILE has JSON lines {"question", "gold", "text", "right"}, with "choices" or "answers" where a grader needs them; or is
GSM8K's example_model_solutions.jsonl. A false positive is a text labelled wrong that a grader calls right; a false
negative is one labelled right that it calls wrong or cannot read. Intervals are Wilson's, at 95 %. Kappa and agreement
are of the texts that both graders decide.

Of a store's turns with labels of the grader "short" it also says how close they come to the gold answers: means over
questions, in per cent, with Student's t intervals. These scores decide nothing. With --bertscore one of them is by the
embeddings of a model (pip install -e '.[bertscore]'), not rescaled, so that unlike answers have far more than 0.

  agentark traces audit --grader numeric --grader symbolic --labelled solutions.jsonl --first 20
  agentark traces audit runs/quickstart
  agentark traces audit runs/quickstart --bertscore roberta-large
"""
_TELEMETRY = """\
Say what the debates of a store did to their agents, by a grader's labels: how often agents, votes and anybody are right
after each round; who moved to the majority of the peers that it heard, and whether that was right; how disagreement
ends; whether a round changes an agent's accuracy at all (a drift); what accuracy costs in calls and generated tokens.
Of a run it is the debate that students learn from.

Shares are per cent and differences points, with 95 % intervals clustered by question.

  agentark traces telemetry runs/quickstart --grader final_answer
  agentark traces telemetry debates.sqlite --grader choice --json telemetry.json
"""

_SAMPLE = "of the turns that the grader can read, this many are judged as well, to compare the two (default: 100)"
_CONTEXT = "what the judge takes at most without servers; what does not fit stays unparseable (default: 4096)"
_LAYER = "whose embeddings count (default: what bert-score has found best for a hub id, otherwise the last)"
_WHOSE = f"whose labels say what is right: {', '.join(GRADERS)}, or the beginning of an id that `label` printed"


def traces(arguments: Sequence[str]) -> int:
    """`agentark traces`; the exit code. Raises UsageError for arguments that cannot be used."""
    parser = Parser("agentark traces", _TRACES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(name: str, summary: str, description: str) -> Parser:
        return commands.add_parser(name, help=summary, description=description)

    stats = command("stats", "counts, tokens and cost", _STATS)
    stats.add_argument("store", metavar="STORE", type=store_file)
    stats.add_argument(
        "--by",
        type=_columns,
        default=LEDGER[:3],
        help=f"count by these, of {','.join(LEDGER)} (default: the first three)",
    )
    stats.add_argument(
        "--prices", type=_prices, metavar="PROMPT,CACHED,COMPLETION", help="of a million tokens each, in any currency"
    )
    stats.set_defaults(run=_stats)

    show = command("show", "one call in full", _SHOW)
    show.add_argument("store", metavar="STORE", type=store_file)
    show.add_argument("key", metavar="KEY")
    show.add_argument("--tokenizer", type=Path, metavar="DIR", help="the directory of the model that was asked")
    show.set_defaults(run=_show)

    export = command("export", "to Parquet or canonical JSON lines", _EXPORT)
    export.add_argument("store", metavar="STORE", type=store_file)
    target = export.add_mutually_exclusive_group(required=True)
    target.add_argument("--parquet", metavar="URL", help="a directory to write four Parquet files to")
    target.add_argument("--canonical", metavar="FILE", type=Path, help="a file to write JSON lines to")
    export.set_defaults(run=_export)

    merge = command("merge", "several stores into one", _MERGE)
    merge.add_argument("out", metavar="OUT", type=store_file)
    merge.add_argument("sources", metavar="IN", nargs="+", help="a store, a run's directory, or a Parquet export's URL")
    merge.set_defaults(run=_merge)

    verify = command("verify", "find what was changed or damaged", _VERIFY)
    verify.add_argument("store", metavar="STORE", type=store_file)
    verify.set_defaults(run=_verify)

    audit = command("audit", "how far graders agree", _AUDIT)
    source = audit.add_mutually_exclusive_group(required=True)
    source.add_argument("store", metavar="STORE", type=store_file, nargs="?", help="compare the labels in it")
    source.add_argument("--labelled", metavar="FILE", type=Path, help="texts with labels (.gz too)")
    audit.add_argument(
        "--grader", action="append", choices=GRADERS, default=[], help="one to try on FILE; may be repeated"
    )
    audit.add_argument("--first", type=int, default=10, metavar="N", help="disagreements to list (default: 10)")
    audit.add_argument(
        "--bertscore", metavar="MODEL", help="directory or hub id of an encoder: BERTScore by it as well"
    )
    audit.add_argument("--bertscore-layer", type=count_of, metavar="N", help=_LAYER)
    audit.set_defaults(run=_audit)

    bring = command("import", "debates that others held", _IMPORT)
    bring.add_argument("file", metavar="FILE", type=Path)
    bring.add_argument("out", metavar="OUT", type=store_file)
    bring.add_argument("--model", required=True, metavar="NAME", help="who debated, as the turns will say")
    bring.add_argument("--tokenizer", required=True, metavar="MODEL", help="directory or hub id that has the tokenizer")
    bring.add_argument("--rounds", required=True, metavar="PATH", help="the lists of texts")
    bring.add_argument("--question", default="question", metavar="PATH", help="(default: question)")
    bring.add_argument("--answer", default="answer", metavar="PATH", help="the gold answer (default: answer)")
    bring.add_argument("--choices", default="", metavar="PATH,...", help="a list of choices, or one path for each")
    bring.add_argument("--context", metavar="PATH", help="what is to be read before the question")
    bring.add_argument("--task", default="imported", metavar="NAME", help="of the questions (default: imported)")
    bring.set_defaults(run=_import)

    label = command("label", "grade all turns", _LABEL)
    label.add_argument("store", metavar="STORE", type=store_file)
    label.add_argument("--grader", choices=GRADERS, required=True)
    label.add_argument("--judge", metavar="MODEL", help="a model that is asked about what the grader cannot read")
    label.add_argument("--blind", action="store_true", help="it is told no right answer, and is asked about all turns")
    label.add_argument("--judge-sample", type=count_of, default=100, metavar="N", help=_SAMPLE)
    label.add_argument("--servers", nargs="+", default=[], metavar="URL", help="SGLang servers that have the judge")
    label.add_argument("--context", type=count_of, default=4096, metavar="TOKENS", help=_CONTEXT)
    label.set_defaults(run=_label)

    choose = command("select", "training trajectories of a variant, or of each", _SELECT)
    choose.add_argument("store", metavar="STORE", type=store_file)
    choose.add_argument("--grader", required=True, metavar="GRADER", help=_WHOSE)
    choose.add_argument("--out", required=True, metavar="DIR", type=Path)
    choose.add_argument(
        "--variant", choices=get_args(Variant), action="append", help="may be repeated (default: all possible)"
    )
    choose.add_argument("--seed", type=int, default=SelectionConfig.seed, metavar="N", help="of `random` (default: 0)")
    choose.add_argument("--per-question", type=int, default=SelectionConfig.per_question, metavar="N")
    choose.add_argument(
        "--match",
        action="store_true",
        help="make the variants alike: the same questions, as many and as long trajectories of each",
    )
    choose.set_defaults(run=_select)

    tell = command("telemetry", "whom agents follow, and what a round is worth", _TELEMETRY)
    tell.add_argument("store", metavar="STORE", type=store_file)
    tell.add_argument("--grader", required=True, metavar="GRADER", help=_WHOSE)
    tell.add_argument("--json", metavar="FILE", type=Path, help="a file to write the figures to")
    tell.set_defaults(run=_telemetry)

    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def store_file(text: str) -> Path:
    path = Path(text)
    return path / "traces.sqlite" if path.is_dir() else path


def _columns(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(LEDGER) or len(set(names)) < len(names):
        raise ArgumentTypeError(f"{text!r} is not a choice of {','.join(LEDGER)}, each once")
    return names


def _prices(text: str) -> tuple[float, ...]:
    try:
        prices = tuple(map(float, text.split(",")))
    except ValueError:
        prices = ()
    if len(prices) != 3 or not all(0 <= price < float("inf") for price in prices):
        raise ArgumentTypeError(f"{text!r} is not three numbers of 0 or more: prompt,cached,completion")
    return prices


def count_of(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ArgumentTypeError(f"{text!r} is no count")
    return int(text)


@contextmanager
def _watched(title: str, total: int | None) -> Iterator[OnTurns]:
    """A bar on standard error that counts turns."""
    done = 0
    with Display(Console(stderr=True)).bar(title, total) as bar:

        def advance(turns: int) -> None:
            nonlocal done
            done += turns
            bar.set(done, total, 0)

        yield advance


def make_console() -> Console:
    # Ids and paths are printed as they are: ":m:" in one is no emoji and "[m]" no markup. What is piped has no width.
    shown = partial(Console, highlight=False, emoji=False, markup=False, soft_wrap=True)
    console = shown()
    return console if console.is_terminal else shown(width=200)


def _turn_count(store: TraceStore) -> int:
    total = store.ledger()[0]
    return total.calls + total.failed


def _stats(options: Namespace) -> int:
    with TraceStore(options.store, read_only=True) as store, store.snapshot():
        rows, total, questions = store.ledger(*options.by), store.ledger()[0], len(store.questions())
    table = Table(
        title=f"{plain(str(options.store))}: {questions:,} questions, {total.calls:,} calls", title_justify="left"
    )
    for name in options.by:
        table.add_column(name)
    heads = ["calls", "failed", "prompt tokens", "of them cached", "completion tokens", "seconds"]
    for head in heads + ["price"] * (options.prices is not None):
        table.add_column(head, justify="right")

    def add(usage: Usage, group: Sequence[str | int]) -> None:
        counts = (usage.calls, usage.failed, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        cells = [*(f"{count:,}" for count in counts), f"{usage.seconds:,.1f}"]
        if options.prices is not None:
            cells.append(f"{usage.price(*options.prices):,.4f}")
        table.add_row(*(Text(plain(str(value))) for value in group), *cells)

    for row in rows:
        add(row, row.group)
    table.add_section()
    add(total, ["all", *[""] * (len(options.by) - 1)])
    make_console().print(table)
    return 0


def _show(options: Namespace) -> int:
    if not re.fullmatch("[0-9a-f]+", options.key):
        raise UsageError(f"KEY {options.key!r} is no beginning of a key: keys are hexadecimal digits.")
    with TraceStore(options.store, read_only=True) as store:
        keys = store.keys(options.key)
        if len(keys) != 1:
            listed = f"{len(keys)} begin with it: {', '.join(keys[:10])}" if keys else "no call begins with it"
            raise UsageError(f"{options.store}: KEY {options.key} names no single call; {listed}.")
        turns = list(store.turns(keys=keys))
    console = make_console()
    console.print(_facts(turns[0]))
    console.rule("prompt", align="left")
    console.print(Text(_prompt(turns[0], options.tokenizer)))
    for turn in turns:
        completion = turn.completion
        console.rule(f"attempt {turn.attempt}", align="left")
        if completion is None:
            console.print(Text(f"failed: {plain(turn.error or '')}", style="red"))
            continue
        console.print(Text(plain(completion.text)))
        if options.tokenizer is None:
            console.print(Text(f"ids: {completion.ids.tolist()}", style="dim"))
        server = "" if completion.server is None else f", by {plain(completion.server)}"
        console.print(
            Text(
                f"{completion.prompt_tokens:,} prompt tokens ({completion.cached_tokens:,} cached), "
                f"{len(completion.ids):,} completion tokens, ended by {completion.finish}, "
                f"{completion.seconds:.2f} s{server}",
                style="dim",
            )
        )
        if completion.text_only:
            console.print(Text("text only: the ids were encoded from it, there are no log-probabilities", style="dim"))
    return 0


def _facts(turn: Turn) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in {"key": turn.key, **turn.call.to_json()}.items():
        if name == "sampling":
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        if name != "prompt":
            table.add_row(Text(name, style="bold"), Text(plain(", ".join(value) if name == "parents" else str(value))))
    return table


def _prompt(turn: Turn, directory: Path | None) -> str:
    if directory is None:
        return "\n".join(f"ids: {list(segment)}" for segment in turn.call.prompt)
    from agentark_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(directory)
    if tokenizer.hash != turn.call.tokenizer:
        raise UsageError(
            f"--tokenizer {directory}: its hash is {tokenizer.hash}, the call was made with {turn.call.tokenizer}. "
            "Give the directory of the model that was asked."
        )
    return plain(tokenizer.decode(turn.call.prompt_ids.tolist()))


def _export(options: Namespace) -> int:
    target = options.parquet or options.canonical
    with TraceStore(options.store, read_only=True) as store, _watched("export turns", _turn_count(store)) as on_turns:
        if options.parquet is not None:
            count = exchange.export_parquet(store, options.parquet, on_turns)
        else:
            count = store.export_canonical(options.canonical, on_turns)
    print(f"{target}: {count:,} turns")
    return 0


def _merge(options: Namespace) -> int:
    with TraceStore(options.out) as out:
        for source in options.sources:
            held = store_file(source)
            place = str(held) if held.is_file() else source
            with _watched(f"merge {source}", None) as on_turns:
                added = exchange.merge(out, place, on_turns)
            print(f"{source}: {added:,} turns added")
        print(f"{options.out}: {_turn_count(out):,} turns")
    return 0


def _verify(options: Namespace) -> int:
    with TraceStore(options.store, read_only=True) as store:
        count = _turn_count(store)
        with _watched("verify turns", count) as on_turns:
            problems = store.verify(on_turns)
    for problem in problems:
        print(plain(problem))
    print(f"{options.store}: {count:,} turns, {len(problems)} problems")
    return 1 if problems else 0


def _audit(options: Namespace) -> int:
    console = make_console()
    if options.labelled is None:
        if options.grader:
            raise UsageError(
                "--grader tries graders on texts with labels; give those with --labelled, or leave it out."
            )
        with TraceStore(options.store, read_only=True) as store, store.snapshot():
            labels = {name: store.labels(name) for name in store.graders()}
            free = labels.get(grader("short").id, {})
            if len(labels) < 2 and not free:
                raise UsageError(f"{options.store} has labels of {len(labels)} graders; an audit compares two or more.")
            if free:
                near = None if options.bertscore is None else BERTScore(options.bertscore, options.bertscore_layer)
                console.print(_closeness(scores_by_group(store, free, near), [*SCORES, *([NAME] if near else [])]))
                if near:
                    console.print(Text(plain(f"{NAME} by layer {near.layer} of {options.bertscore}, F1, not rescaled")))
            elif options.bertscore is not None:
                raise UsageError(f"{options.store} has no labels of the grader short, whose turns --bertscore is for.")
        if len(labels) > 1:
            console.print(_agreements(_verdicts(labels)))
        return 0
    if options.bertscore is not None:
        raise UsageError("--bertscore says how close a store's free answers come; give the store, without --labelled.")
    if not options.grader:
        raise UsageError(f"--labelled needs a --grader to try; use one or more of: {', '.join(GRADERS)}.")
    rows = read_labelled(options.labelled)
    graders = [grader(name) for name in dict.fromkeys(options.grader)]
    grades = {each.id: [each(row.question, row.text) for row in rows] for each in graders}
    wrong = sum(not row.right for row in rows)
    table = Table(
        title=f"{plain(str(options.labelled))}: {len(rows):,} texts, {wrong:,} labelled wrong", title_justify="left"
    )
    for head in ("grader", "right", "wrong", "unparseable", "false positives", "false negatives"):
        table.add_column(head, justify="left" if head == "grader" else "right")
    differing = []
    for name, given in grades.items():
        counts = Counter(grade.verdict for grade in given)
        pairs = list(zip(rows, given, strict=True))
        false = [(row, grade) for row, grade in pairs if row.right != (grade.verdict == "right")]
        positives = sum(grade.verdict == "right" for _, grade in false)
        shares = _share(positives, wrong), _share(len(false) - positives, len(rows) - wrong)
        table.add_row(name, *(f"{counts[each]:,}" for each in ("right", "wrong", "unparseable")), *shares)
        differing += [(name, row, grade) for row, grade in false]
    console.print(table)
    if len(grades) > 1:
        console.print(_agreements({name: [grade.verdict for grade in given] for name, given in grades.items()}))
    for name, row, grade in differing[: options.first]:
        said = f"{grade.verdict} {grade.answer or grade.detail}"
        console.print(
            Text(plain(f"{name}: {said}; labelled {'right' if row.right else 'wrong'}; gold {row.question.answer}")),
            Text(plain(f"  ...{row.text[-200:]}"), style="dim"),
            sep="\n",
        )
    if len(differing) > options.first:
        console.print(f"{len(differing) - options.first:,} more disagreements; --first lists them")
    return 0


def _verdicts(labels: Mapping[str, Mapping[str, Label]]) -> dict[str, list[Verdict]]:
    """Of each grader, its verdicts on the turns that any of them labelled; none is unparseable."""
    keys = sorted(set[str]().union(*labels.values()))
    return {
        name: [given[key].verdict if key in given else "unparseable" for key in keys] for name, given in labels.items()
    }


def _closeness(groups: Mapping[Group, Mapping[str, Sequence[Sequence[float]]]], scores: Sequence[str]) -> Table:
    table = Table(title="how close answers come to the gold ones, %", title_justify="left")
    for head in ("protocol", "role", "round", "turns", "questions", *scores):
        table.add_column(head, justify="left" if head in ("protocol", "role") else "right")
    for (protocol, role, round), questions in sorted(groups.items()):
        means = np.asarray([np.mean(rows, axis=0) for rows in questions.values()])
        counts = (round, sum(map(len, questions.values())), len(questions))
        names = (Text(plain(protocol)), Text(plain(role)))
        table.add_row(*names, *(f"{count:,}" for count in counts), *map(_mean, means.T))
    return table


def _mean(shares: np.ndarray) -> str:
    from agentark_jax.evaluation.statistics import seed_level_interval

    shown = f"{100 * shares.mean():.1f}"
    interval = seed_level_interval(shares.tolist()) if len(shares) > 1 else None
    if interval is None:
        return shown
    return f"{shown} [{100 * max(0.0, interval.low):.1f}, {100 * min(1.0, interval.high):.1f}]"


def _agreements(verdicts: Mapping[str, Sequence[Verdict]]) -> Table:
    table = Table()
    for head in ("first", "second", "decided by both", "both right", "first alone", "second alone", "both wrong"):
        table.add_column(head, justify="left" if head in ("first", "second") else "right", overflow="fold")
    table.add_column("agreement", justify="right")
    table.add_column("kappa", justify="right")
    for first, second in combinations(verdicts, 2):
        found = agreement(verdicts[first], verdicts[second])
        counts = (found.n, found.both_right, found.first_right, found.second_right, found.both_wrong)
        kappa = "" if found.kappa is None else f"{found.kappa:.3f}"
        names = (Text(plain(first)), Text(plain(second)))
        table.add_row(*names, *(f"{count:,}" for count in counts), _share(found.agreed, found.n), kappa)
    return table


def _share(count: int, n: int) -> str:
    from agentark_jax.evaluation.statistics import wilson_interval

    if n == 0:
        return "none"
    low, high = wilson_interval(np.arange(n) < count)
    return f"{count:,}/{n:,} = {count / n:.2%} [{low:.2%}, {high:.2%}]"


def _import(options: Namespace) -> int:
    from agentark_jax.data.chat import make_format
    from agentark_jax.data.config import PromptConfig
    from agentark_jax.models.gguf import resolve_model

    choices = tuple(filter(None, options.choices.split(",")))
    columns = FieldsConfig(options.question, options.answer, choices=choices, context=options.context)
    form = make_format(resolve_model(options.tokenizer, weights=False), PromptConfig())
    # Whatever the answers are like, all that is wanted of the gold one here is that it is a text.
    judge = "choice" if choices else "symbolic"
    count = 0
    with TraceStore(options.out) as store, _watched("import turns", None) as on_turns:
        for row in read_file(options.file, "FILE"):
            debate = read_debate(row, columns, options.rounds, judge, options.task)
            turns = list(turns_of(debate, form, options.model))
            store.put_question(debate.question)
            store.record_many(turns)
            on_turns(len(turns))
            count += len(turns)
    print(f"{options.out}: {count:,} turns of {options.file}")
    return 0


def _label(options: Namespace) -> int:
    rule = grader(options.grader)
    if options.judge is None and (options.blind or options.servers):
        raise UsageError("--blind and --servers are about a judge: name its model with --judge, or leave them out.")
    with TraceStore(options.store) as store:
        label_store(store, rule, rule.id)
        labels = {rule.id: store.labels(rule.id)}
        if options.judge is not None:
            asked = set(labels[rule.id]) if options.blind else to_judge(labels[rule.id], options.judge_sample)
            judge = asyncio.run(_judge(store, asked, options))
            labels[judge.id] = store.labels(judge.id)
            if judge.too_long:
                print(
                    f"{judge.too_long:,} turns do not fit the judge's context with their questions and stay "
                    "unparseable; raise --context, or give servers with a longer one"
                )
        compared = _verdicts(labels)
        if options.judge is not None and not options.blind:
            both = with_fallback(labels[rule.id], labels[judge.id], judge.id)
            store.put_labels(both)
            labels |= {label.grader: store.labels(label.grader) for label in both[:1]}
    table = Table(title=plain(str(options.store)), title_justify="left")
    for head in ("grader", "turns", *get_args(Verdict)):
        table.add_column(head, justify="left" if head == "grader" else "right", overflow="fold")
    for name, given in labels.items():
        counts = Counter(label.verdict for label in given.values())
        table.add_row(Text(plain(name)), f"{len(given):,}", *(f"{counts[each]:,}" for each in get_args(Verdict)))
    console = make_console()
    console.print(table)
    if len(compared) > 1:
        console.print(_agreements(compared))
    return 0


async def _judge(store: TraceStore, keys: Set[str], options: Namespace) -> Judge:
    """The judge that the options describe, once all of these turns have its labels."""
    from agentark_jax.cache import enable_compilation_cache
    from agentark_jax.data.chat import make_format
    from agentark_jax.data.config import PromptConfig
    from agentark_jax.engines.config import EngineConfig, check_servers
    from agentark_jax.generation import Generation, Model, Seat
    from agentark_jax.models.config import load_config
    from agentark_jax.models.gguf import resolve_model
    from agentark_jax.models.weights import weights_fingerprint

    check_servers("--servers", options.servers)
    enable_compilation_cache()
    directory = resolve_model(options.judge)
    config = load_config(directory)
    form = make_format(directory, PromptConfig(), embeddings=config.vocab_size)
    # Wherever its directory lies, it is the same judge.
    name = directory.name if Path(options.judge).exists() else options.judge
    model = Model(name, directory, weights_fingerprint(directory), config, form)
    # Nearly all of the work is reading, in many different lengths.
    settings = EngineConfig(slots=8, prompt_bucket=128, context=options.context)
    generation = Generation(settings, store, Display(Console(stderr=True)), seed=0)
    async with generation.engine(Seat(model, tuple(options.servers)), options.context) as engine:
        judge = Judge(engine, form, blind=options.blind)
        missing = undecided(keys, store.labels(judge.id))
        with _watched("judge turns", len(missing)) as on_turns:
            await judge_store(store, judge, missing, on_turns)
    return judge


def graded_by(store: TraceStore, name: str) -> str:
    """The id of the grader that a name, or the beginning of an id that the store has labels of, stands for."""
    if name in GRADERS:
        return grader(name).id
    known = store.graders()
    found = [each for each in known if each == name] or [each for each in known if each.startswith(name)]
    if len(found) != 1:
        listed = ", ".join(map(plain, known)) or "none yet, see `agentark traces label`"
        raise UsageError(
            f"--grader {name!r} begins the id of {len(found)} graders in {store.path}; give one of "
            f"{', '.join(GRADERS)}, or the beginning of one of: {listed}."
        )
    return found[0]


def of_debate(store: Path) -> list[str] | None:
    """The turns of a run's own debate. Its store has those of its controls and of held-out questions as well."""
    listed = store.with_name("debate") / "keys.json"
    return json.loads(listed.read_text()) if listed.is_file() else None


def _select(options: Namespace) -> int:
    with TraceStore(options.store, read_only=True) as store:
        judge = graded_by(store, options.grader)
        rows = labelled_turns(store, judge, keys=of_debate(options.store), protocol=DEBATE)
        chosen = {
            variant: select(rows, SelectionConfig(variant, options.per_question, seed=options.seed), store.completions)
            for variant in options.variant or possible(rows)
        }
    matched = None
    if options.match:
        for variant, selection in chosen.items():
            check_filled(variant, selection)
        matched = match(chosen, options.seed)
        chosen = matched.selections
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{plain(str(options.store))}, {plain(judge)}: {len(rows):,} turns", title_justify="left")
    for head in ("variant", "trajectories", "tokens", "questions", "of all turns"):
        table.add_column(head, justify="left" if head == "variant" else "right")
    manifest = {}
    for variant, selection in chosen.items():
        save_selection(selection, options.out / f"{variant}.parquet")
        figures = selection.figures
        counts = (f"{figures[name]:,}" for name in ("trajectories", "tokens", "questions"))
        table.add_row(variant, *counts, _share(figures["trajectories"], len(rows)))
        manifest[variant] = {**figures, "yield": figures["trajectories"] / len(rows) if rows else None}
    figures = {"store": str(options.store), "grader": judge, "variants": manifest}
    write_json(options.out / "manifest.json", figures | ({"matched": matched.figures} if matched else {}))
    make_console().print(table)
    return 0


def _telemetry(options: Namespace) -> int:
    from agentark_jax.evaluation.telemetry import telemetry
    from agentark_jax.report.telemetry import sentences, tables

    with TraceStore(options.store, read_only=True) as store:
        judge = graded_by(store, options.grader)
        rows = labelled_turns(store, judge, keys=of_debate(options.store), protocol=DEBATE, role=DEBATER)
        parents = store.parents(row.key for row in rows)
    if not rows:
        raise UsageError(f"{options.store}: no debate is in it.")
    figures = telemetry([(rows, parents)])
    if options.json is not None:
        write_json(options.json, {"store": str(options.store), "grader": judge, **figures})
    console = make_console()
    counts = f"{figures['debates']:,} debates of {figures['questions']:,} questions, {figures['turns']:,} turns"
    console.print(f"{plain(str(options.store))}, {plain(judge)}: {counts}")
    for table in tables(figures):
        console.print(table)
    for sentence in sentences(figures):
        console.print(sentence)
    return 0

"""What a person decides about bundles: to challenge, to promote, to roll back. Each is one event of the registry."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlray import languages
from mlray.config import ConfigError, RunConfig, RunError
from mlray.console import wide
from mlray.evaluation import comparison
from mlray.release import bundle, companions, gate, judging
from mlray.release.bundle import Beside
from mlray.release.gate import Verdict
from mlray.release.registry import Event, History, Registry, open_registry

_NAMES = {"index": "an index of products", "knowledge": "an index of answers"}
"""What is served with a bundle."""


def decide(config: RunConfig, asked: Namespace) -> None:
    """What `jobs/promote.py` was asked for, and the history afterwards.

    Raises:
        ConfigError: as `challenge`, `promote` and `rollback`.
        RunError: likewise; or the gate refused.
    """
    console, verdict = wide(), None
    if asked.rollback:
        rollback(config, asked.why, asked.bundle, console)
    elif asked.to == "challenger":
        beside = Beside(
            markets=_markets("--adapter", asked.adapter),
            companions={name: uri for name in companions.KINDS if (uri := getattr(asked, name))},
            sessions=_markets("--recommender-adapter", asked.recommender_adapter),
        )
        challenge(config, asked.run, asked.why, beside)
    elif asked.to == "champion":
        verdict, _ = promote(
            config,
            asked.bundle,
            asked.index,
            asked.why,
            knowledge=asked.knowledge,
            judged=asked.judged,
            dry_run=asked.dry_run,
        )
        if verdict:
            gate.show(verdict, console)
        else:
            console.print("no other champion: there is nothing to compare with")
    show(open_registry(config).history(), console)
    if verdict and not verdict.passed:
        raise RunError(f"the gate refused: {verdict.refusals[0]}")


def _markets(option: str, told: Sequence[str]) -> dict[str, str]:
    """`tag=run` as they stand on the command line."""
    found = {}
    for one in told:
        tag, _, uri = one.partition("=")
        if not uri or languages.normalize(tag) != tag or tag in found:
            raise ConfigError(f"{option} {one}: say MARKET=RUN, such as de=runs/align-de, each market once")
        found[tag] = uri
    return found


def challenge(config: RunConfig, run_uri: str, why: str, beside: Beside = bundle.ALONE) -> Event:
    """Makes a bundle of a run, and of adapters and models beside it, and names it the challenger.

    Raises:
        ConfigError: as `bundle.make`.
        RunError: storage failed, or somebody else was first.
    """
    registry = open_registry(config)
    before = registry.history()
    name = bundle.make(run_uri, registry, beside)
    return registry.append(before, action="challenge", bundle=name, index=None, why=why)


def promote(
    config: RunConfig,
    name: str | None,
    index: str | None,
    why: str,
    *,
    knowledge: str | None = None,
    judged: str | None = None,
    dry_run: bool = False,
) -> tuple[Verdict | None, Event | None]:
    """Asks the gate, and makes a bundle champion if it says yes.

    Args:
        config: where the registry is, and the limits of the gate.
        name: the bundle; None is the challenger.
        index: the product index that is served with it, built by its encoder; `auto`: the one that there is.
        why: a sentence for the history.
        knowledge: the index of answers, likewise.
        judged: an evaluation of the champion on the test sets of the other, where those are not its own.
        dry_run: only ask.

    Returns:
        The verdict (None: there is no other champion), and the event (None: the gate refused, or `dry_run`).

    Raises:
        ConfigError: no such bundle, an index of another encoder, or the reports are on different rows.
        RunError: a file of the bundle or index is missing or altered, or somebody else was first.
    """
    registry = open_registry(config)
    before = registry.history()
    if name is None:
        if before.challenger is None:
            raise ConfigError(
                f"{registry.uri} has no challenger; name a bundle, or --to challenger --run first"
            )
        name = before.challenger.bundle
    beside = {
        kind: only_index(registry, name, kind) if one == "auto" else one
        for kind, one in (("index", index), ("knowledge", knowledge))
    }
    champion = before.champion
    if champion and champion.bundle == name and _beside(champion) == beside:
        raise ConfigError(f"{name} is champion already")
    registry.check("bundles", name)
    _check_beside(registry, champion, name, beside)
    verdict = _verdict(registry, before, name, judged, config)
    if dry_run or (verdict and not verdict.passed):
        return verdict, None
    said = verdict.to_dict() if verdict else None
    return verdict, registry.append(before, action="promote", bundle=name, why=why, verdict=said, **beside)


def _beside(event: Event) -> dict[str, str | None]:
    """The indexes that are served with a bundle."""
    return {"index": event.index, "knowledge": event.knowledge}


def rollback(config: RunConfig, why: str, name: str | None = None, console: Console | None = None) -> Event:
    """Makes the bundle and its indexes champion that were so before the present ones.

    Args:
        config: where the registry is.
        why: a sentence for the history.
        name: of an earlier champion; None is the last one that is whole.
        console: is told of those that are not.

    Raises:
        ConfigError: there was none before, or not this one.
        RunError: none is whole any more, or somebody else was first.
    """
    registry = open_registry(config)
    before = registry.history()
    earlier = [one for one in before.reigns[:-1] if name in {None, one.bundle}]
    if not earlier:
        what = f"{name} is no earlier champion" if name else "there is no champion before the present one"
        raise ConfigError(f"{registry.uri}: {what}, nothing to go back to")
    faults = []
    for one in reversed(earlier):
        if (fault := _fault(registry, one)) is None:
            return registry.append(before, action="rollback", bundle=one.bundle, why=why, **_beside(one))
        faults.append(fault)
        if console:
            console.print(f"passed over: {fault}", markup=False, highlight=False)
    raise RunError(f"{faults[0]}; nothing was changed")


def _fault(registry: Registry, reign: Event) -> str | None:
    """What is wrong with a bundle or one of the indexes that were served with it."""
    beside = [("indexes", one) for one in _beside(reign).values() if one is not None]
    for kind, one in [("bundles", reign.bundle), *beside]:
        if fault := registry.fault(kind, one):
            return f"{registry.place(kind, one)} is damaged: {fault}"
    return None


def only_index(registry: Registry, name: str, kind: str, *, newest: bool = False) -> str:
    """The index (`kind`: or `knowledge`) that there is of a bundle; with `newest` the one that holds most changes.

    Raises:
        ConfigError: there is none, or several.
    """
    positions = {}
    for one in registry.names("indexes"):
        with suppress(RunError):  # a damaged one is none to choose, and may belong to another bundle
            about = registry.about("indexes", one)
            if about.get("bundle") == name and about.get("kind", "index") == kind:
                positions[one] = about.get("position", 0) if newest else 0
    last = max(positions.values(), default=0)
    built = [one for one, position in positions.items() if position == last]
    if len(built) != 1:
        made = f"jobs/index.py --bundle {name}" + " --knowledge" * (kind == "knowledge")
        choose = "take one away, as none is newer" if newest else "name one"
        told = f"there are {', '.join(built)}; {choose}" if built else f"{made} makes one"
        raise ConfigError(f"--{kind} auto: {name} has {len(built)} indexes; {told}")
    return built[0]


def _check_beside(
    registry: Registry, champion: Event | None, name: str, beside: Mapping[str, str | None]
) -> None:
    for kind, one in beside.items():
        if one is not None:
            registry.check("indexes", one)
            _check_index(registry, name, one, kind)
        elif champion and _beside(champion)[kind]:
            raise ConfigError(
                f"{champion.bundle} is served with {_NAMES[kind]}; name one for {name}, or --{kind} auto"
            )


def _check_index(registry: Registry, name: str, index: str, kind: str) -> None:
    about = registry.about("indexes", index)
    if about.get("bundle") != name:
        raise ConfigError(
            f"the index {index} was built by the encoder of {about.get('bundle')}, and {name} would not find in it; "
            f"jobs/index.py --bundle {name}"
        )
    if (own := str(about.get("kind", "index"))) != kind:
        raise ConfigError(f"{index} is {_NAMES[own]}, and --{kind} takes {_NAMES[kind]}")


def _verdict(
    registry: Registry, history: History, name: str, judged: str | None, config: RunConfig
) -> Verdict | None:
    if history.champion is None or history.champion.bundle == name:  # only the index is another
        return None
    champion = history.champion.bundle
    registry.check("bundles", champion)  # its figures decide as much as those of the other
    own = nullcontext((*bundle.report_of(registry, champion), ()))
    new, new_rows = bundle.report_of(registry, name)
    with judging.rejudged(registry, champion, judged) if judged else own as (old, old_rows, others):
        try:
            found = comparison.compare(old_rows, new_rows, config.storage, for_gate=True)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; if the test sets are others now: jobs/evaluate.py --bundle {champion} --output FOLDER on "
                "them, and promote with --judged FOLDER"
            ) from None
    p_values = {key: cell.p for key, cell in found.cells.items()}
    reigned = (one.verdict for one in reversed(history.reigns) if one.bundle == champion and one.verdict)
    best = gate.best(next(reigned, None))
    # Figures on other rows tell nothing of these.
    reached = {cell: value for cell, value in best.items() if cell[:2] not in others}
    return gate.judge(old, new, p_values, config.release, reached)


def show(history: History, console: Console) -> None:
    """Prints the history, the newest event last, and who is champion and challenger."""
    table = Table(title="History", title_justify="left")
    for heading in ("", "when", "who", "what", "bundle", "index", "why"):
        table.add_column(heading, overflow="fold")
    for event in history.events:
        table.add_row(
            str(event.number),
            event.when[:19],
            escape(event.who),
            event.action,
            escape(event.bundle),
            escape(event.index or "-"),
            escape(event.why),
        )
    console.print(table)
    champion, challenger = history.champion, history.challenger
    console.print(f"champion    {champion.bundle if champion else '-'}", markup=False, highlight=False)
    console.print(
        f"index       {(champion.index if champion else None) or '-'}", markup=False, highlight=False
    )
    if champion and champion.knowledge:
        console.print(f"knowledge   {champion.knowledge}", markup=False, highlight=False)
    console.print(f"challenger  {challenger.bundle if challenger else '-'}", markup=False, highlight=False)

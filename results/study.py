"""The two studies whose figures the READMEs quote: many runs of vrrl.py, then tables and a chart.

    python results/study.py [seeds=5] [methods="sft rl vrrl"] [task=grounding] [key=value ...]
    python results/study.py when [seeds=3] [key=value ...]      when VRRL helps: strengths of SFT
    python results/study.py [when] tables [task=..] [name=..]   shows them again, from the JSON

The first runs every method with every seed and writes study_TASK.json beside this file. The second
runs plain RL and VRRL after SFT of each of STRENGTHS and writes when_TASK.json. Other words are
settings of all runs; a method's own win over them. Seed n has data of its own, make.draw=n. name=X
stands in the names of files: a study of other settings needs one. The same command goes on where it was stopped; a second shares the work.
"""
import contextlib, json, sys, tempfile, time
from itertools import product
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
import data_prep
import vrrl
from data_prep import UserError, lock, write_file

STRENGTHS = ((150, 40), (200, 40), (450, 40), (450, 60), (450, 120))
SFT_STEPS = "sft.first_steps", "sft.steps"  # what the two numbers of a strength are
OPTIONS = "seeds=", "methods=", "name="
EARLY = 5  # RL steps in which the policy is still nearly the SFT model
NAMES = {"vrrl": "VRRL", "rl": "plain RL", "sft": "SFT"}  # in charts, in the order of colours
PROBES = "other_picture", "blank", "hidden"
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2))
LOGGED = ("commit_wrong", "rollin_commit_wrong", "first", "final", "turns", "rollin_repair",
          "wrong_states", "exact_x", "exact_y", "entropy", "kept")

class Study:
    """A cell of a study is (strength, method, seed); strength: of STRENGTHS, () without `when`."""

    def __init__(self, words):
        self.when = "when" in words
        options = dict(w.split("=", 1) for w in words if w.startswith(OPTIONS))
        self.words = [w for w in words
                      if w not in ("when", "tables") and w.partition("=")[0] not in options]
        cfg, _ = vrrl.read_config(self.words)
        self.given = {*options}  # what the words name
        for word in self.words:
            key, equals, _ = word.partition("=")
            self.given |= {key} if equals else set(vrrl.flatten(vrrl.read_yaml(word)))
        config = vrrl.read_yaml(RESULTS.parent / "config.yaml")["methods"]
        self.own = {method: vrrl.flatten(row) for method, row in config.items()}
        self.methods = ["rl", "vrrl"] if self.when else list(self.own)
        methods = options.get("methods", " ".join(self.methods)).split()
        if not methods or set(methods) - set(self.own):
            raise UserError(f"methods= takes some of: {' '.join(self.own)}")
        varied = {key for method in methods for key in self.own[method] if key.startswith("sft.")}
        varied |= {"methods", *SFT_STEPS} if self.when else set()
        varied |= {"seed", "make.draw", "method", "mode", "run", "eval.probes"}
        for key in varied & self.given:
            raise UserError(f"{key}= is set by the study, or by a method of it: leave it out")
        count = options.get("seeds", "3" if self.when else "5")
        if count not in map(str, range(1, 101)):
            raise UserError(f"seeds={count} is not allowed; it is how many seeds, 1 to 100")
        self.strengths = STRENGTHS if self.when else ((),)
        cells = product(self.strengths, dict.fromkeys(methods), range(int(count)))
        # Cells that share an SFT model stand far apart: the second would wait for the first.
        self.cells = sorted(cells, key=lambda c: (c[1] != "sft", self.when and c[1], c[2]))
        parts = cfg.profile * (cfg.profile != "default"), options.get("name")
        name = "-".join([cfg.task, *filter(None, parts)])
        self.runs = Path("runs") / f"{'when' if self.when else 'study'}-{name}"
        self.file = RESULTS / f"{'when' if self.when else 'study'}_{name}.json"

    def folder(self, cell):
        strength, method, seed = cell
        return self.runs / "-".join([*map(str, strength), method, f"seed{seed}"])

    def words_of(self, cell):
        """Words for vrrl.main. They repeat what the user's words undo of the method, and no more:
        vrrl.py makes the SFT model that it compares with from the same words."""
        strength, method, seed = cell
        undone = [(key, value) for key, value in self.own[method].items() if key in self.given]
        undone = [f"{key}={value}" for key, value in (*undone, *zip(SFT_STEPS, strength))]
        return ["eval.probes=yes", *self.words, *undone,
                f"method={method}", f"seed={seed}", f"make.draw={seed}", f"run={self.folder(cell)}"]

    def done(self):  # also cells that are not asked for now
        return [cell for cell in product(self.strengths, self.methods, range(100))
                if (self.folder(cell) / "results.json").is_file()]

    def settings(self, cell):
        """Settings of a cell that is done. UserError if they are not those asked for."""
        made = vrrl.read_yaml(self.folder(cell) / "settings.yaml")
        for key, value in vrrl.read_config(self.words_of(cell))[1].items():
            if key not in ("run", "data") and made.get(key, value) != value:
                raise UserError(f"{self.folder(cell)} has {key}={made[key]}, now {value}: move it")
        return made

    def run(self):
        """Run what is not done. Where another process is at a cell, come back to it later."""
        with tempfile.TemporaryFile(dir=RESULTS):  # what is wrong is noticed now, not after hours
            self.check_count({*self.cells, *self.done()})
        for cell in self.done():
            self.settings(cell)
        left = list(self.cells)
        while left:
            cell = left.pop(0)
            try:
                if cell not in self.done():
                    print(f"== {self.folder(cell)}; then {len(left)} to go", file=sys.stderr)
                    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
                        vrrl.main(self.words_of(cell))
                    with contextlib.suppress(UserError):  # the file may hold more, until the end
                        self.write()
            except UserError as error:
                if "in use" not in str(error):
                    raise
                left.append(cell)
                time.sleep(5)
        self.write()

    def check_count(self, cells):
        """UserError if the results file holds more cells: they may be hours of work."""
        held = json.loads(self.file.read_text())["about"]["cells"] if self.file.is_file() else []
        if len(held) > len(cells):
            raise UserError(f"{self.file} holds {len(held)} cells and would now get {len(cells)}: "
                            "ask for all of them (seeds=, methods=), or move it away")

    def write(self):
        with lock(self.runs, wait=True):
            done = self.done()
            self.check_count(done)
            parts = self.entries(done) if self.when else self.rows_and_training(done)
            text = json.dumps({"about": self.about(done), **parts})
            # A line for each cell and row, so that a diff shows which have changed.
            write_file(self.file, text.replace('}, {"', '},\n{"') + "\n")

    def about(self, cells):
        """What made the figures. seconds: of the process that ended the cell."""
        settings, lines = {}, []
        keys = "seconds", "device", "torch", "transformers", "workers"
        varied = "seed", "make.draw", "method", "run", "program", *(SFT_STEPS if self.when else ())
        for cell in cells:
            made = self.settings(cell)
            about = json.loads((self.folder(cell) / "results.json").read_text())["about"]
            lines.append({"method": cell[1], "seed": cell[2], "strength": cell[0],
                          **{key: about[key] for key in keys}, "program": made["program"]})
            settings[cell[1]] = {(k, v) for k, v in made.items() if k not in varied}
        shared = set.intersection(*settings.values())
        own = {method: dict(sorted(values - shared)) for method, values in settings.items()}
        return {"settings": dict(sorted(shared)), "methods": own, "cells": lines}

    def rows(self, cell, method=None):
        """The rows of results.json of the cell's method; "sft": of the SFT model it began with."""
        found = json.loads((self.folder(cell) / "results.json").read_text())["rows"]
        return [{**row, "seed": cell[2]} for row in found if row["method"] == (method or cell[1])]

    def log(self, cell):
        return list(map(json.loads, (self.folder(cell) / "metrics.jsonl").read_text().splitlines()))

    def rows_and_training(self, cells):
        """training: [step, *LOGGED], the means of at most 60 blocks of steps."""
        training = {}
        for cell in (cell for cell in cells if cell[1] in ("rl", "vrrl")):
            lines = self.log(cell)
            training.setdefault(cell[1], {})[cell[2]] = [
                [part[-1]["step"], *(mean(line[key] for line in part) for key in LOGGED)]
                for part in np.array_split(lines, min(60, len(lines)))]
        return {"rows": [row for cell in cells for row in self.rows(cell)], "training": training}

    def entries(self, cells):
        """One for each strength and seed of which both runs are done. Shares in [0, 1]."""
        entries = []
        for strength, seed in product(STRENGTHS, range(100)):
            pair = [(strength, method, seed) for method in self.methods]
            if set(pair) <= set(cells):
                early = self.log(pair[0])[:EARLY]
                right, final = (mean(line[key] for line in early) for key in ("first", "final"))
                rows = self.rows(pair[0], "sft"), *map(self.rows, pair)
                sft, rl, ours = (mean(x["final"] for x in pick(part, ood=True)) for part in rows)
                mended = (final - right) / max(1 - right, 1e-9)
                entries.append({"strength": strength, "seed": seed, "right": right, "sft": sft,
                                "rl": rl, "vrrl": ours, "gap": ours - rl, "mended": mended})
        return {"entries": entries}

def mean(values):
    """Mean of what is not None; None if nothing is left."""
    values = [value for value in values if value is not None]
    return round(sum(values) / len(values), 5) if values else None

def pick(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

def seed_difference(new, old, key, against=None, samples=2000):
    """(mean, low, high) of new - old in points, with a 95 % bootstrap interval; () without pairs.

    new, old: rows of two methods, paired by seed, split and question; or of one, where `against`
    is another key. Seeds weigh the same, and so do splits. A resample takes seeds with replacement,
    and questions of each split and seed: each seed has questions of its own.
    """
    rng = np.random.default_rng(0)

    def counts(n):  # how often each of n is taken, (1 + samples, n); in the first line once
        return np.concatenate((np.ones((1, n)), rng.multinomial(n, [1 / n] * n, samples)))

    # {split: {seed: means of its resamples, (1 + samples,)}}
    means = {}
    for row in new:
        for other in pick(old, seed=row["seed"], split=row["split"]):
            pairs = zip(row[f"{key}_by_question"], other[f"{against or key}_by_question"])
            gap = np.array([int(a) - int(b) for a, b in pairs if "-" not in (a, b)])
            if len(gap):
                taken = counts(len(gap))
                means.setdefault(row["split"], {})[row["seed"]] = taken @ gap / len(gap)
    if not means:
        return ()
    seeds = sorted(set().union(*means.values()))
    weights = dict(zip(seeds, counts(len(seeds)).T))
    of_split = []
    for by_seed in means.values():
        total = sum(weights[seed] for seed in by_seed)
        weighted = sum(weights[seed] * values for seed, values in by_seed.items())
        of_split.append(np.ma.masked_invalid(weighted / np.ma.masked_equal(total, 0)))
    found = 100 * np.ma.stack(of_split).mean(0)
    return (found[0], *np.percentile(found[1:].compressed(), [2.5, 97.5]))

def t_interval(gaps):
    """(mean, low, high) of one number a seed, Student's t; () for fewer than 2 or more than 10."""
    if len(gaps) not in T95:
        return ()
    half = T95[len(gaps)] * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return np.mean(gaps), np.mean(gaps) - half, np.mean(gaps) + half

def brackets(found, form="+.1f"):
    return "{:{f}} [{:{f}}, {:{f}}]".format(*found, f=form) if found else "-"

def spread(rows, key):
    """The mean over seeds, in brackets the lowest and the highest. Splits weigh the same."""
    means = [mean(row[key] for row in pick(rows, seed=seed)) for seed in {r["seed"] for r in rows}]
    means = [value if key == "turns" else 100 * value for value in means if value is not None]
    found = (np.mean(means), min(means), max(means)) if means else ()
    return brackets(found, ".2f" if key == "turns" else ".1f")

def markdown(title, head, lines):
    lines = [[name.replace("_", " ") for name in head], ["---"] * len(head), *lines]
    return "\n| ".join([f"**{title}**\n", *(" | ".join(map(str, x)) + " |" for x in lines)]) + "\n"

def tables(found):
    """The tables of study_TASK.json, Markdown."""
    of = {}
    for row in found["rows"]:
        of.setdefault(row["method"], []).append({**row, "gain": row["final"] - row["first"]})
    keys = "first", "final", "gain", "repair_own", "repair_fixed", "commit", "turns"
    for where, ood in (("Out of distribution", True), ("In distribution", False)):
        lines = [[method, *(spread(pick(rows, ood=ood), key) for key in keys)]
                 for method, rows in of.items()]
        yield markdown(f"{where}, % [lowest, highest seed]", ["method", *keys], lines)
    splits = list(dict.fromkeys(row["split"] for row in found["rows"]))
    lines = [[method, *(spread(pick(rows, split=split), "final") for split in splits)]
             for method, rows in of.items()]
    yield markdown("Final accuracy by split, %", ["method", *splits], lines)
    far = {method: pick(rows, ood=True) for method, rows in of.items()}
    by_seed = {method: {row["seed"]: 100 * mean(r["final"] for r in pick(rows, seed=row["seed"]))
                        for row in rows} for method, rows in far.items()}
    seeds, ours = sorted(set().union(*by_seed.values())), by_seed.get("vrrl", {})
    lines = []
    for method, values in by_seed.items():
        gaps = [ours[seed] - values[seed] for seed in values if seed in ours and method != "vrrl"]
        lines.append([method, *(f"{values[s]:.1f}" if s in values else "-" for s in seeds),
                      brackets(t_interval(gaps))])
    yield markdown("Final by seed, ood, %", ["method", *map(str, seeds), "VRRL - it [t]"], lines)
    keys = "final", "first", "repair_fixed"
    lines = [[method, *(brackets(seed_difference(far["vrrl"], rows, key)) for key in keys)]
             for method, rows in far.items() if method != "vrrl" and "vrrl" in far]
    yield markdown("VRRL minus ..., out of distribution, points [95 %]", ["", *keys], lines)
    lines = []
    for method, rows in far.items():
        if "once_hidden" in rows[0]:
            rates = (spread(rows, f"once_{view}") for view in ("fixed", *PROBES))
            gaps = (seed_difference(rows, rows, "once_fixed", f"once_{view}") for view in PROBES)
            lines.append([method, *rates, *map(brackets, gaps)])
    title = "Next answer right, ood, after true and false pictures; true minus false [95 %]"
    head = ["method", "true", *PROBES, *(f"minus {probe}" for probe in PROBES)]
    if lines:
        yield markdown(title, head, lines)

def panels(found):
    """The charts of study_TASK.json, for data_prep.line_charts. Percent; a run for each seed."""
    right, commits, repairs = {}, {}, {}
    for method, name in NAMES.items():
        rows = pick(found["rows"], method=method, ood=True)
        by_seed = [[row["after_turn"] for row in pick(rows, seed=seed)]
                   for seed in sorted({row["seed"] for row in rows})]
        if by_seed:
            runs = [100 * np.mean(splits, 0) for splits in by_seed]
            right[name] = range(1, len(runs[0]) + 1), *runs
        logs = found["training"].get(method)
        if logs:
            logs = np.array([*logs.values()], float)  # (seeds, points, step and figures)
            for chart, figure in ((commits, "commit_wrong"), (repairs, "rollin_repair")):
                column = 1 + LOGGED.index(figure)
                if column < logs.shape[2]:  # older files have fewer figures
                    chart[name] = logs[0, :, 0], *(100 * logs[:, :, column])
    charts = {"right after so many turns, ood, %": right,
              "commits of wrong answers by RL step, %": commits,
              "repair of roll-ins by RL step, %": repairs}
    return [(title, series) for title, series in charts.items() if series]

def when_tables(found):
    keys, lines = ("right", "mended", "sft", "rl", "vrrl", "gap"), []
    for pair in STRENGTHS:
        part = pick(found["entries"], strength=list(pair))
        lines.append([*pair, len(part), *(spread(part, key) for key in keys)])
    title = f"Steps 1-{EARLY} of RL: right first, mended; final ood, gap; % [lowest, highest seed]"
    return [markdown(title, ["first_steps", "steps", "seeds", *keys], lines)]

def when_panels(found):
    """The charts of when_TASK.json: a dot for each seed, a line through the means of a strength."""
    charts = []
    for key, name in (("mended", "mended failures"), ("right", "right at first")):
        at, series = {}, {"mean": []}
        for entry in found["entries"]:
            x, y = 100 * entry[key], 100 * entry["gap"]
            at.setdefault(str(entry["strength"]), []).append((x, y))
            # The NaN after a value makes a dot of it.
            series.setdefault(f"seed {entry['seed']}", []).extend([(x, y), (x, np.nan)])
        series["mean"] = sorted(tuple(np.mean(part, 0)) for part in at.values())
        charts.append((f"VRRL minus plain RL, ood, by {name}, %",
                       {name: np.transpose(dots) for name, dots in series.items() if dots}))
    return charts

def main(words):
    if {"-h", "--help", "help"} & set(words):
        return print(__doc__)
    study = Study(words)
    if "tables" not in words:
        study.run()
    if not study.file.is_file():
        raise UserError(f"{study.file}: no such study yet; leave out the word tables")
    found = json.loads(study.file.read_text())
    charts = when_panels(found) if study.when else panels(found)
    data_prep.line_charts(study.file.with_suffix(".png"), charts, len(charts))
    print(*(when_tables(found) if study.when else tables(found)), sep="\n")
    cells = found["about"]["cells"]
    print(f"{len(cells)} runs, {sum(cell['seconds'] for cell in cells) / 3600:.1f} hours; "
          f"versions of the program: {len({cell['program'] for cell in cells})}")

if __name__ == "__main__":
    vrrl.run_main(main, sys.argv[1:])

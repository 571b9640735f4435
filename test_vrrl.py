"""Properties that vrrl.py and data_prep.py must keep. Run `pytest -q`: four to seven minutes on two cores, no network, no trained weights.

The policy under test is the embedded model with random weights, or the same after a few SFT steps (`taught`), so that
it keeps to the protocol and its conversations have several turns. The command line is run once (`smoke`).
"""
import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import data_prep
import vrrl

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
LAKE = ["SFF", "FHF", "FFG"]  # two shortest ways, of four moves: around the hole
EXACT = "right right down down"


# ---------------------------------------------------------------- fixtures and helpers


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("vrrl")


@pytest.fixture(scope="session")
def cfg(home):
    return settings(home)


@pytest.fixture(scope="session")
def task(cfg):
    return vrrl.Navigation(cfg, show=False)


@pytest.fixture(scope="session")
def policy(cfg):
    return fresh_policy(cfg)


@pytest.fixture(scope="session")
def lessons():
    """What SFT of `taught` logged, a dict a step."""
    return []


@pytest.fixture(scope="session")
def taught(cfg, task, lessons):
    """A policy that has seen the smoke demonstrations a few times: it keeps to the protocol and solves little."""
    policy, log = fresh_policy(cfg), Listener(lessons)
    traces = [vrrl.demonstration(policy, task, e) for e in task.load("sft")]
    vrrl.supervise(policy, lambda step: vrrl.items_of(traces, 8, step, 0), 60, 3e-3, "sft", log)
    return policy


class Listener(vrrl.Log):
    """Keeps the lines of metrics.jsonl in a list."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def __call__(self, line):
        self.lines.append(line)


def fresh_policy(cfg):
    """The embedded model with random weights, through the code that loads every model."""
    if not (Path(cfg.data) / "random-model").is_dir():
        model, tokenizer, processor = data_prep.build_embedded(0, data_prep.POINTING)
        vrrl.save_policy(vrrl.Policy(model, tokenizer, processor, cfg), Path(cfg.data) / "random-model")
    return vrrl.load_policy(Path(cfg.data) / "random-model", cfg)


def settings(home, *words):
    return vrrl.read_config(["profile=smoke", "policy.dtype=float32", f"data={home / 'data'}", *words])[0]


def with_settings(policy, **changes):
    """The same model under other `policy` settings."""
    cfg = policy.cfg
    return vrrl.Policy(policy.model, policy.tokenizer, policy.processor, dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, **changes)))


def turns(task, *texts):
    return [vrrl.Turn([], [], (), *vrrl.parse_turn(task, text), text) for text in texts]


def answer(moves):
    return f"<ANSWER>{moves}</ANSWER>"


def revise(moves):
    return f"<THINK>hole</THINK><ANSWER>{moves}</ANSWER>"


def final(moves):
    return f"<FINAL>{moves}</FINAL>"


def scripted(policy, task, example, *texts):
    """An episode in which the assistant says these texts; all its tokens are trained."""
    return vrrl.demonstration(policy, task, {**example, "turns": [{"text": text, "loss": True} for text in texts]})


def demonstrations(policy, task, least=2, count=8):
    """SFT traces as episodes of at least so many turns."""
    return [vrrl.demonstration(policy, task, e) for e in task.load("sft") if len(e["turns"]) >= least][:count]


def rolled_in(policy, task, example, wrong="up", **changes):
    """The start of a roll-in after one attempt."""
    episode = scripted(policy, task, example, answer(wrong), final(wrong))  # a turn that another follows is drawn
    return dataclasses.replace(episode, replayed=episode.turns[:1], turns=[], **changes)


def talkative(monkeypatch, seed=0):
    """Every finished turn counts as another random attempt, so that conversations last until the limit."""
    rng = random.Random(seed)
    monkeypatch.setattr(vrrl, "parse_turn", lambda task, text: ("answer", "hole", tuple(rng.choices(list(MOVES), k=rng.randint(1, 9)))))


def pictures_of(policy, pictures):
    """The library's own input for these pictures: pixel_values and image_grid_thw."""
    return policy.processor(images=[Image.fromarray(p.pixels) for p in pictures], return_tensors="pt")


@torch.no_grad()
def library_logits(policy, episode):
    """Logits (L, V) of one plain forward of the library's model over a whole conversation."""
    ids = torch.tensor([[*episode.opening, *episode.rest]])
    images = pictures_of(policy, [*episode.opening_pictures, *episode.rest_pictures])
    config = policy.model.config.text_config
    ours, config._attn_implementation = config._attn_implementation, "sdpa"  # the library's own attention
    try:
        return policy.model(input_ids=ids, mm_token_type_ids=ids.eq(policy.image_id).int(), pixel_values=images["pixel_values"],
                            image_grid_thw=images["image_grid_thw"]).logits[0]
    finally:
        config._attn_implementation = ours


def library_log_probs(policy, episode):
    """What `log_probs` should give: softmax over the tokens that may be sampled, at the sampling temperature."""
    logits = library_logits(policy, episode) / policy.temperature
    logits[:, policy.banned] = -torch.inf
    logp, ids, head = logits.log_softmax(-1), [*episode.opening, *episode.rest], len(episode.opening)
    return torch.stack([logp[head + c - 1, ids[head + c]] for c, _ in episode.actions])


def furthest(one, other):
    """Largest difference between two lists of tensors of the same shapes."""
    one, other = [torch.as_tensor(x) for x in one], [torch.as_tensor(x) for x in other]
    assert [x.shape for x in one] == [x.shape for x in other]
    return max((a - b).abs().max().item() for a, b in zip(one, other) if a.numel())


def recorded(episode):
    """Log-probs noted while sampling, of the tokens that may be trained."""
    return torch.tensor([logp for t in episode.turns for logp, on in zip(t.logps, t.trained) if on])


def fails(capsys, words, function=vrrl.main):
    """Run a command in this process that must fail as a user's mistake; returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        vrrl.run_main(function, ["threads=1", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("word, said", [
    ("sed=3", "nearest: seed"), ("rl.step=3", "nearest: rl.steps"), ("lr=1", "nearest: "), ("steps", "key=value"), ("--seed", "key=value"),
    ("seed=three", "seed=three is not allowed"), ("rl.steps=1.5", "0 to 1000000"), ("seed=", "not allowed"), ("seed=-1", "0 to 1000000"),
    ("rl.rho=1.01", "0 to 1"), ("rl.lr=nan", "0 to 1"), ("rl.lr=inf", "0 to 1"), ("rl.samples=1", "2 to 256"),
    ("rl.std_norm=maybe", "yes, no"), ("task=chess", "allowed: navigation"), ("method=ppo", "sft"), ("profile=huge", "default, long, smoke"),
    ("mode=play", "train, eval"), ("rl.prefix_mask=some", "none, random, expected"), ("device=tpu", "auto, cpu, cuda"),
])
def test_a_wrong_setting_is_one_clear_line(capsys, word, said):
    line = fails(capsys, [word])
    assert said in line and word.split("=")[0] in line


@pytest.mark.parametrize("model", ["nowhere", "assets/nowhere", "/tmp", "./no/folder", ""])
def test_a_model_that_is_no_model_folder_is_one_clear_line(capsys, home, task, model):
    assert f"model={model}" in fails(capsys, ["profile=smoke", f"data={home / 'data'}", f"runs={home / 'runs-none'}", "mode=eval", f"model={model}"])


def test_a_model_folder_with_broken_files_is_one_clear_line(capsys, home, task, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in fails(capsys, ["profile=smoke", f"data={home / 'data'}", f"runs={tmp_path / 'runs'}", "mode=eval", f"model={tmp_path}"])


@pytest.mark.parametrize("mode", ["train", "eval", "show"])
def test_a_runs_folder_that_cannot_be_made_is_one_clear_line(capsys, home, task, policy, tmp_path, mode):
    vrrl.save_policy(policy, tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    line = fails(capsys, ["profile=smoke", f"data={home / 'data'}", f"runs={tmp_path / 'file' / 'runs'}", f"mode={mode}", f"model={tmp_path / 'model'}"])
    assert str(tmp_path / "file") in line


def test_a_data_folder_that_cannot_be_made_is_one_clear_line(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in fails(capsys, ["profile=smoke", f"data={tmp_path / 'file' / 'data'}", f"runs={tmp_path / 'runs'}"])


def test_every_method_and_profile_is_a_row_that_builds():
    spec, config = data_prep.settings_table()
    for name in ("method", "profile"):
        assert set(config[name + "s"]) == set(spec[name][1].split("|"))
    assert set(config["tasks"]) == set(vrrl.TASKS) == set(spec["task"][1].split("|"))
    for task, method, profile in itertools.product(config["tasks"], config["methods"], config["profiles"]):
        cfg, flat = vrrl.read_config([f"task={task}", f"method={method}", f"profile={profile}"])
        expected = {**config["tasks"][task], **config["profiles"][profile], **config["methods"][method]}
        assert {k: flat[k] for k in expected} == expected and (cfg.method, cfg.rl.steps) == (method, flat["rl.steps"])


def test_every_default_is_allowed_and_explained():
    for key, (default, allowed, sentence) in data_prep.settings_table()[0].items():
        assert data_prep.check_value(key, default, (default, allowed, sentence)) == default and sentence


def test_the_command_line_overrides_the_rows():
    assert vrrl.read_config(["rl.steps=7", "method=sft", "profile=smoke"])[0].rl.steps == 7


def test_help_names_every_setting(capsys):
    vrrl.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in data_prep.settings_table()[0])


# ---------------------------------------------------------------- data


def breadth_first(layout, start):
    """Least moves from `start` to the goal, or None; written anew, forwards, to check data_prep against."""
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        (r, c), steps = queue.popleft()
        if layout[r][c] == "G":
            return steps
        for dr, dc in MOVES.values():
            at = r + dr, c + dc
            if 0 <= at[0] < len(layout) and 0 <= at[1] < len(layout[0]) and layout[at[0]][at[1]] != "H" and at not in seen:
                seen.add(at)
                queue.append((at, steps + 1))


def elf(layout):
    return next((r, c) for r, row in enumerate(layout) for c, kind in enumerate(row) if kind == "S")


def places(layout, moves):
    """Cells entered up to the first move off the grid or into a hole, and whether there was none."""
    at, cells = elf(layout), []
    for move in moves:
        at = at[0] + MOVES[move][0], at[1] + MOVES[move][1]
        if not (0 <= at[0] < len(layout) and 0 <= at[1] < len(layout[0])) or layout[at[0]][at[1]] == "H":
            return cells, False
        cells.append(at)
    return cells, True


def random_attempts(count=1500):
    """(layout, moves): aimless ones, shortest paths, and near misses."""
    rng = random.Random(0)
    for _ in range(count):
        layout = data_prep.random_layout(rng, rng.randint(3, 7))
        path = data_prep.sample_shortest_path(layout, rng)
        yield layout, tuple(rng.choice([path, path + rng.choices(list(MOVES), k=2), path[:-1] + rng.choices(list(MOVES), k=2),
                                        data_prep.corrupt(layout, path, rng), rng.choices(list(MOVES), k=rng.randint(1, 9))]))


def test_exact_agrees_with_a_breadth_first_search(task):
    seen = Counter()
    for layout, moves in random_attempts():
        cells, legal = places(layout, moves)
        expected = legal and layout[cells[-1][0]][cells[-1][1]] == "G" and len(moves) == breadth_first(layout, elf(layout))
        assert task.exact({"layout": layout}, moves) == expected, (layout, moves)
        seen[expected] += 1
    assert min(seen.values()) > 200


def test_progress_agrees_with_a_breadth_first_search(task):
    for layout, moves in random_attempts():
        optimal = breadth_first(layout, elf(layout))
        left = [optimal] + [breadth_first(layout, cell) for cell in places(layout, moves)[0]]
        good = next((n for n in range(1, len(left)) if left[n] >= left[n - 1]), len(left)) - 1
        expected = 0 if good == optimal and len(moves) > optimal else good / optimal
        assert task.progress({"layout": layout}, moves) == pytest.approx(expected), (layout, moves)


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path):
    made = dict(train_maps=40, sft_traces=16, test_maps=4, dev_maps=4, progress=False)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data_prep.make_navigation(tmp_path / name, seed=seed, **made)
    a, b, c = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "abc")
    assert a == b and a.keys() == c.keys() and a[Path("train.jsonl")] != c[Path("train.jsonl")]


def test_no_map_is_used_twice_and_demonstrations_are_of_training_maps(home, tmp_path):
    crowded = vrrl.Navigation(settings(home, f"data={tmp_path}", "nav.test_maps=150", "nav.dev_maps=150"), show=False)  # 3x3 maps are few
    maps = [tuple(e["layout"]) for split in splits() for e in crowded.load(split)]
    assert len(set(maps)) == len(maps)
    assert {tuple(e["layout"]) for e in crowded.load("sft")} <= {tuple(e["layout"]) for e in crowded.load("train")}


def splits():
    return ["train"] + [f"{part}_{kind}" for part in ("test", "dev") for kind in ("id", "size", "look", "both")]


def test_every_map_is_solvable(task):
    assert all(breadth_first(e["layout"], elf(e["layout"])) for split in splits() for e in task.load(split))


@pytest.mark.parametrize("split", splits())
def test_a_split_has_its_sizes_and_looks(task, split):
    kind, examples = split.split("_")[-1], task.load(split)
    sizes, looks = {len(e["layout"]) for e in examples}, {e["look"] for e in examples}
    assert sizes == ({6, 7} if kind in ("size", "both") else {3, 4, 5})
    own = {*data_prep.MIXES, "snow"} if kind == "train" else {"snow"}
    assert looks <= {"night", "desert", "ink"} if kind in ("look", "both") else looks <= own and "snow" in looks
    assert all(task.image(e).size == (len(e["layout"]) * 16,) * 2 for e in examples)


def test_demonstrations_keep_to_the_protocol_and_end_exact(task):
    for e in task.load("sft"):
        said = turns(task, *(t["text"] for t in e["turns"]))
        assert vrrl.well_formed(task, said) and task.exact(e, said[-1].attempt)
        assert not any(task.exact(e, t.attempt) for t in said[:-2])


def test_feedback_is_the_image_with_something_drawn_on_it(task):
    for e in task.load("test_both"):
        image, drawn = task.image(e), task.feedback(e, ("up", "right"))
        assert image.size == drawn.size and np.any(np.asarray(image) != np.asarray(drawn))


def test_attempts_that_differ_are_drawn_differently(task):
    e = {**task.load("train")[0], "layout": None}
    e["layout"] = next(x for x in task.load("train") if len(x["layout"]) == 5)["layout"]
    e["image"] = next(x for x in task.load("train") if x["layout"] == e["layout"])["image"]
    seen = {}
    for length in (1, 2, 3):
        for moves in itertools.product(MOVES, repeat=length):
            cells, at = [], elf(e["layout"])
            for m in moves:  # the drawing stops where the path leaves the grid
                at = at[0] + MOVES[m][0], at[1] + MOVES[m][1]
                cells.append(at)
                if not (0 <= at[0] < 5 and 0 <= at[1] < 5):
                    break
            seen.setdefault(task.feedback(e, moves).tobytes(), set()).add(tuple(cells))
    assert all(len(paths) == 1 for paths in seen.values())


@pytest.mark.parametrize("look", data_prep.LOOKS)
def test_a_move_off_the_grid_is_drawn_in_its_own_colour(look):
    layout = ["SF", "FG"]
    alert = lambda moves: np.all(np.asarray(data_prep.draw_path(data_prep.draw_grid(layout, look), (2, 2), (0, 0), moves, look))
                                 == data_prep.LOOKS[look].alert, -1)
    assert not alert(["right", "down"]).any()
    up, left, later = alert(["up"]), alert(["left"]), alert(["right", "right"])
    assert up.any() and left.any() and later.any() and (up != left).any() and (later != up).any()


def test_the_embedded_tokenizer_knows_every_word(policy, task):
    said = [w for n in range(150) for _, q, a in data_prep.see_talk(random.Random(n), 3) for w in (q, a)]
    said += [t["text"] for e in task.load("sft") for t in e["turns"]] + [policy.cfg.protocol.question, policy.cfg.protocol.feedback]
    assert not any(policy.tokenizer.unk_token_id in policy.encode(text) for text in said)


@pytest.mark.parametrize("line, reason", [
    ("{not json", "JSON"), ('["a"]', "JSON object"), ('{"id": "x"}', '"image"'), ('{"id": "x", "image": "none.png"}', "does not exist"),
    ('{"id": "x", "image": "../../../etc/passwd"}', "leaves"), ('{"id": "x", "image": "data.json"}', "layout"),
    ('{"id": "x", "image": "data.json", "layout": ["SH", "HG"]}', "no way"), ('{"id": "x", "image": "data.json", "layout": ["SX", "FG"]}', "letters"),
])
def test_a_bad_line_of_data_is_named_by_file_and_line(capsys, home, task, tmp_path, line, reason):
    shutil.copytree(task.folder, tmp_path / task.folder.name)
    file = tmp_path / task.folder.name / "train.jsonl"
    good = file.read_text().splitlines()
    file.write_text("\n".join([*good[:2], line, *good[3:]]))
    other = vrrl.Navigation(settings(home, f"data={tmp_path}"))
    said = fails(capsys, [], lambda words: other.load("train"))
    assert f"{file}:3:" in said and reason in said


def test_a_missing_data_file_and_a_broken_image_are_one_clear_line(capsys, home, task, tmp_path):
    shutil.copytree(task.folder, tmp_path / task.folder.name)
    other = vrrl.Navigation(settings(home, f"data={tmp_path}"))
    example = other.load("train")[0]
    (other.folder / example["image"]).write_bytes(b"\x89PNG broken")
    assert example["image"] in fails(capsys, [], lambda words: other.image(example))
    (other.folder / "train.jsonl").unlink()
    assert "train.jsonl" in fails(capsys, [], lambda words: other.load("train"))


# Tables, charts and one's own data.

POINTING = {"table": vrrl.Table, "chart": vrrl.Chart}
FIGURES = [(task, kind) for task in ("table", "chart") for kind in ("embedded", "text")]


@pytest.fixture(scope="session")
def pointing(home):
    """The tasks of every kind of picture, by (task, kind)."""
    return {(name, kind): POINTING[name](settings(home, f"task={name}", f"points.kind={kind}", *(["points.scale=1000", "points.apart=0.045"] if kind == "text" else []),
                                                  "points.test=12", "points.dev=8"), show=False) for name, kind in FIGURES}


def drawn_size(name, image, style):
    """How many rows an embedded table has, or how many bars or points a chart, counted in its pixels."""
    pixels = np.asarray(image)
    shown = lambda *colours: np.any([(pixels == colour).all(-1) for colour in colours], 0)
    if name == "table":
        head = shown(style.head)
        ys = np.nonzero(shown(style.head, data_prep.BLUE)[:, head.sum(0).argmax()])[0]
        return round((ys.max() + 1 - ys.min()) / 16) - 1
    bars = shown(style.bar, data_prep.RED).any(1 if style.chart == "sideways" else 0).astype(int)
    return (np.diff(np.pad(bars, 1)) == 1).sum()


def pixels_inside(task, example):
    """Attempts whose pixel lies in the box, found by walking over the pixels that the box covers."""
    (width, height), (x0, y0, x1, y1) = example["size"], example["box"]
    end = task.cfg.scale or 32
    across, down = (width / end, height / end) if task.cfg.scale else (8, 8)   # pixels of a step
    return {(x, y) for x in range(end + 1) for y in range(end + 1) if x0 <= x * across < x1 and y0 <= y * down < y1}


@pytest.mark.parametrize("name, kind", FIGURES)
@pytest.mark.parametrize("look", ["paper", "slate", "sand", "print", "mix07"])
def test_a_box_is_exactly_the_pixels_of_its_target(name, kind, look):
    rng = random.Random(f"{name} {kind} {look}")
    for size in [(3, 5), (7, 6)] * 6 if name == "table" else [3, 5, 8] * 4:
        figure = data_prep.FIGURES[name](rng, size, look, kind)
        changed = np.any(np.asarray(figure.paint()) != np.asarray(figure.paint(fill=(1, 2, 3))), -1)
        ys, xs = np.nonzero(changed)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == tuple(figure.box)
        full = (figure.box[2] - figure.box[0]) * (figure.box[3] - figure.box[1])
        assert changed.sum() > 0.6 * full  # a disc fills 3/4 of its square, digits stand in a cell
        assert figure.paint().tobytes() == figure.paint().tobytes() and len(figure.near) > 1
        assert not any(max(a[0], figure.box[0]) < min(a[2], figure.box[2]) and max(a[1], figure.box[1]) < min(a[3], figure.box[3]) for a in figure.near)


@pytest.mark.parametrize("look", [*data_prep.STYLES, "mix00", "mix01", "mix02", "mix03", "mix04"])
def test_an_embedded_table_asks_for_the_cell_where_the_marks_of_its_headers_meet(look):
    rng, shown = random.Random(0), lambda pixels, colour: (pixels == colour).all(-1)
    for _ in range(20):
        figure = data_prep.table_figure(rng, (rng.randint(3, 7), rng.randint(3, 7)), look, "embedded")
        pixels = np.asarray(figure.paint())
        head = shown(pixels, data_prep.style_of(look).head)
        xs = np.nonzero(shown(pixels[head.sum(1).argmax()], data_prep.RED))[0]   # in the row of headers
        ys = np.nonzero(shown(pixels[:, head.sum(0).argmax()], data_prep.BLUE))[0]
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == figure.box
        assert pixels.shape[0] % 16 == 0 and pixels.shape[1] % 16 == 0


def test_training_shows_headers_at_three_corners_and_two_types_of_chart():
    styles = [data_prep.style_of(name) for name in ("paper", *data_prep.MIXES)]
    assert {s.corner for s in styles} == set(data_prep.CORNERS[:3]) and {s.chart for s in styles} == {"bars", "sideways"}
    assert {data_prep.STYLES[name].corner for name in ("slate", "sand", "print")} == set(data_prep.CORNERS[1:])


def test_an_embedded_chart_asks_for_the_bar_that_is_tallest_shortest_or_marked():
    style, rng, asked = data_prep.STYLES["paper"], random.Random(0), Counter()
    for _ in range(60):
        figure = data_prep.chart_figure(rng, rng.randint(3, 8), "paper", "embedded")
        pixels, word = np.asarray(figure.paint()), figure.question.split()[-1]
        bars = (pixels == style.bar).all(-1) | (pixels == data_prep.RED).all(-1)
        high = {x: int(bars[:, x].sum()) for x in np.nonzero(bars.any(0))[0]}
        x0, y0, x1, y1 = figure.box
        rest = [h for x, h in high.items() if not x0 <= x < x1]
        assert {"tallest": high[x0] >= max(rest) + 3, "shortest": high[x0] <= min(rest) - 3,
                "marked": (pixels[y0:y1, x0:x1] == data_prep.RED).all()}[word]
        asked[word] += 1
    assert min(asked.values()) > 8 and len(asked) == 3


@pytest.mark.parametrize("name", POINTING)
def test_the_same_seed_makes_the_same_figures_and_another_does_not(tmp_path, name):
    made = dict(kind="embedded", train=40, sft_traces=16, held_back=1, test=4, dev=4, progress=False)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        data_prep.make_figures(tmp_path / folder, name, seed=seed, **made)
    a, b, c = (contents(tmp_path / folder) for folder in "abc")
    assert a == b and a.keys() == c.keys() and a[Path("train.jsonl")] != c[Path("train.jsonl")]
    assert {f"preview_{split}.png" for split in ["sft", *splits()]} <= {p.name for p in a}


@pytest.mark.parametrize("name, kind", FIGURES)
def test_splits_of_figures_are_disjoint_and_have_their_sizes_and_looks(pointing, name, kind):
    task, seen = pointing[name, kind], []
    for split in splits():
        examples, part = task.load(split), split.split("_")[-1]
        own = {"paper", *data_prep.MIXES} if part == "train" else {"slate", "sand", "print"} if part in ("look", "both") else {"paper"}
        assert {e["look"] for e in examples} <= own and len({e["look"] for e in examples}) >= (part in ("look", "both", "train")) * 3
        for e in examples:
            image = task.image(e)
            assert image.size == tuple(e["size"]) and 0 <= e["box"][0] < e["box"][2] <= image.width and 0 <= e["box"][1] < e["box"][3] <= image.height
            assert kind == "embedded" or 400 <= max(image.size) <= 900
            small, large = data_prep.SIZES[name, kind]
            assert set(np.ravel(e["cells"])) <= set(large if part in ("size", "both") else small)
            if kind == "embedded":
                assert drawn_size(name, image, data_prep.style_of(e["look"])) == np.ravel(e["cells"])[0]
        seen += [(image.size, image.tobytes()) for image in map(task.image, examples)]
    assert len(set(seen)) == len(seen)
    assert {e["image"] for e in task.load("sft")} <= {e["image"] for e in task.load("train")}


@pytest.mark.parametrize("name, kind", FIGURES)
def test_every_size_is_drawn_in_every_look(name, kind):
    plan, (small, large) = data_prep._figure_plan(name, kind, 8000, 250, 150), data_prep.SIZES[name, kind]
    sizes = lambda part: set(itertools.product(part, part)) if name == "table" else set(part)
    for split, items in plan.items():
        shown = Counter(items)
        assert set(shown) == set(itertools.product(sizes(large if split.endswith(("size", "both")) else small), {look for _, look in items}))
        if split == "train":   # whole rounds, and without "paper", which is every fourth look
            shown = Counter(item for item in items[: len(items) // 360 * 360] if item[1] != "paper")
        assert max(shown.values()) - min(shown.values()) <= 1
    assert {look for _, look in plan["train"]} > {"paper", "mix01", "mix39"}


@pytest.mark.parametrize("name", POINTING)
def test_demonstrations_leave_out_the_largest_trained_sizes(capsys, home, pointing, name):
    cells = lambda task, split: {n for e in task.load(split) for n in np.ravel(e["cells"])}
    assert cells(pointing[name, "embedded"], "train") == {3, 4, 5} and cells(pointing[name, "embedded"], "sft") == {3, 4}
    words = lambda *more: settings(home, f"task={name}", *more)
    assert cells(POINTING[name](words("points.held_back=0"), show=False), "sft") == {3, 4, 5}
    assert "points.sft_traces=60" in (said := fails(capsys, [], lambda _: POINTING[name](words("points.sft_traces=60"), show=False))) and "points.held_back" in said


@pytest.mark.parametrize("name, kind", FIGURES)
def test_pointing_demonstrations_keep_to_the_protocol_and_say_where_the_target_lies(pointing, name, kind):
    task, at_once = pointing[name, kind], 0
    examples = task.load("sft")
    for e in examples:
        said = turns(task, *(t["text"] for t in e["turns"]))
        assert vrrl.well_formed(task, said) and task.exact(e, said[-1].attempt)
        assert not any(task.exact(e, t.attempt) for t in said[:-2])
        assert [t["loss"] for t in e["turns"]] == ([True] * 2 if len(said) == 2 else [False] + ["think"] * (len(said) - 3) + [True] * 2)
        for before, after in zip(said, said[1:-1]):
            (x, y), (x0, y0, x1, y1) = task.pixel(e, before.attempt), e["box"]
            words = ["right"] * (x < x0) + ["left"] * (x >= x1) + ["down"] * (y < y0) + ["up"] * (y >= y1)
            assert after.thought == " ".join(words) and words
        at_once += len(said) == 2
    assert at_once == len(examples) / 2


def test_pointing_is_exact_in_the_box_and_progress_falls_with_the_distance(pointing):
    task = pointing["table", "embedded"]
    for e in task.load("test_both"):
        good, longer = pixels_inside(task, e), max(e["size"])
        assert good
        for attempt in itertools.product(range(33), repeat=2):
            assert task.exact(e, attempt) == (attempt in good)
            point = [8 * a for a in attempt]
            distance = math.dist(point, np.clip(point, e["box"][:2], e["box"][2:])) / longer
            assert task.progress(e, attempt) == pytest.approx(1 if attempt in good else min(0.99, max(0, 1 - distance / 0.5)))
        assert task.attempt(e, ((e["box"][0] + e["box"][2]) / 2, (e["box"][1] + e["box"][3]) / 2)) in good


def test_points_closer_than_the_setting_are_the_same_attempt(pointing):
    embedded, text = pointing["table", "embedded"], pointing["table", "text"]
    assert embedded.same((3, 4), (3, 4)) and not embedded.same((3, 4), (3, 5))
    assert text.same((300, 400), (320, 430)) and not text.same((300, 400), (300, 446))


@pytest.mark.parametrize("text, attempt", [
    ("3 14", (3, 14)), ("3,14", (3, 14)), ("(3, 14)", (3, 14)), (" ( 3 14 ) ", (3, 14)), ("0 1000", (0, 1000)), ("1001 3", None), ("3 1001", None),
    ("3", None), ("3 4 5", None), ("-3 4", None), ("3.5 4", None), ("x y", None), ("", None), ("3 14 down", None), ("٣ 4", None), ("9" * 400 + " 1", None),
])
def test_a_point_is_parsed_only_inside_its_scale(pointing, text, attempt):
    assert pointing["chart", "text"].parse(text) == attempt


@pytest.mark.parametrize("name, kind", FIGURES)
def test_a_drawn_point_is_seen_in_every_look_and_each_point_differently(pointing, name, kind):
    task = pointing[name, kind]
    for e in [*task.load("train")[:8], *task.load("test_look")]:
        plain, drawn = np.asarray(task.image(e)).astype(int), set()
        right, low = map(int, task.ends(e))
        for attempt in [(0, 0), (right, low), (right // 2, low // 2), (right // 4, low // 2), (right // 2, 0), (right, 0)]:
            feedback = task.feedback(e, attempt)
            there = np.abs(np.asarray(feedback).astype(int) - plain).max(-1) > 60
            assert feedback.size == task.image(e).size and there.sum() >= 8
            ys, xs = np.nonzero(there)
            x, y = task.pixel(e, attempt)
            near = max(8, max(e["size"]) / 40)
            assert np.all((np.abs(xs - x) < 3) | (np.abs(ys - y) < 3) | (np.hypot(xs - x, ys - y) < near))  # nothing but the hairs and the mark
            drawn.add(feedback.tobytes())
        assert len(drawn) == 6


def test_a_crop_is_of_its_size_inside_the_image_and_shows_the_mark(pointing):
    task = copy.copy(pointing["chart", "text"])
    task.cfg = dataclasses.replace(task.cfg, feedback="crop")
    for e in task.load("test_id")[:4]:
        for attempt in [(0, 0), (1000, 1000), (500, 500), (10, 990)]:
            crop, whole = task.feedback(e, attempt), data_prep.draw_point(task.image(e), task.pixel(e, attempt))
            left = [min(max(int(min(p, side - 1)) - 100, 0), side - 200) for p, side in zip(task.pixel(e, attempt), e["size"])]
            assert crop.size == (200, 200)
            assert crop.tobytes() == whole.crop((left[0], left[1], left[0] + 200, left[1] + 200)).tobytes()
            assert (np.asarray(crop) == data_prep.HAIR).all(-1).any()
    small = Image.new("RGB", (90, 300))
    assert data_prep.draw_point(small, (5, 5), 200).size == (90, 200)


def test_with_scale_0_coordinates_are_pixels_of_the_image_as_the_model_sees_it(home, policy):
    fresh_policy(policy.cfg)
    task = vrrl.Table(settings(home, "task=table", "points.kind=text", "points.step=1", f"model={home / 'data' / 'random-model'}"), show=False)
    for e in task.load("test_id"):
        seen = policy.picture(task.image(e)).pixels  # resized to whole visual tokens
        attempt = task.attempt(e, ((e["box"][0] + e["box"][2]) / 2, (e["box"][1] + e["box"][3]) / 2))
        assert task.exact(e, attempt) and task.ends(e) == (seen.shape[1], seen.shape[0])
        assert task.pixel(e, (seen.shape[1], seen.shape[0])) == tuple(e["size"])
    assert task.parse("3000 12") == (3000, 12)


def test_a_question_goes_into_the_words_around_it(home, pointing):
    task = copy.copy(pointing["table", "text"])
    task.cfg = dataclasses.replace(task.cfg, question="Look. {question} Answer x y.", reply="again")
    e = task.load("test_id")[0]
    assert task.question(e) == (f"Look. {e['question']} Answer x y.", "again") and e["question"].startswith("Point at the cell in row '")


def test_the_embedded_tokenizer_knows_every_word_of_pointing(policy, pointing):
    said = [w for n in range(300) for _, q, a in data_prep.point_talk(random.Random(n), 3) for w in (q, a)]
    for name in POINTING:
        task = pointing[name, "embedded"]
        said += [t["text"] for e in task.load("sft") for t in e["turns"]] + [w for e in task.load("test_both") for w in task.question(e)]
    assert not any(policy.tokenizer.unk_token_id in policy.encode(text) for text in said)
    assert {"say the point", "say the columns", "say the rows", "say the bars"} <= set(said)


def test_pointing_lessons_say_what_is_in_the_picture_and_are_of_all_sizes():
    shapes, heres = set(), 0
    for n in range(300):
        for image, question, answer in data_prep.point_talk(random.Random(n), 2):
            shapes.add((image.width, image.height))
            if question == "say the cells":
                words = Counter(answer.split())
                assert set(words) <= {"plain", "marked", "here", "found"} and words["marked"] + words["found"] in (1, 2)
                heres += words["here"] + words["found"]
                continue
            numbers = [int(word) for word in answer.split()]
            assert image.width % 16 == image.height % 16 == 0 and all(0 <= v <= min(max(image.size) / 8, data_prep.MOST) for v in numbers)
            if question == "say the point":
                x, y = (min(8 * v, side - 1) for v, side in zip(numbers, image.size))
                assert image.getpixel((x, y)) == data_prep.HAIR
            elif question != "say the bars":
                assert numbers == sorted(numbers) and 3 <= len(numbers) <= 8
    assert {h for _, h in shapes} >= {64, 80, 96, 112, 128} and heres > 50


@pytest.fixture
def own(tmp_path, home):
    """Makes own data: a JSONL of 20 images of 40 x 30 pixels with two questions each, and the lines given."""
    def make(*lines, images=20):
        for n in range(images):
            Image.new("RGB", (40, 30), (n, 0, 0)).save(tmp_path / f"picture{n}.png")
        good = [json.dumps({"image": f"picture{n}.png", "question": f"where is {q}?", "box": [4 + q, 5, 20, 25.5]}) for n in range(images) for q in range(2)]
        (tmp_path / "my.jsonl").write_text("\n".join([good[0], *lines, *good[1:]]) + "\n")
        return vrrl.Points(settings(home, "task=points", f"data={tmp_path / 'my.jsonl'}"), show=False)
    return make


def test_own_data_is_divided_by_image(own):
    task = own()
    parts = {split: task.load(split) for split in ("train", "dev_id", "test_id")}
    images = {split: {e["image"] for e in examples} for split, examples in parts.items()}
    assert sum(len(examples) for examples in parts.values()) == 40 and all(len(parts[s]) == 2 * len(images[s]) for s in parts)
    assert len(images["train"]) > 10 and len(set.union(*images.values())) == 20 == sum(map(len, images.values()))
    assert {e["image"] for e in task.load("sft")} <= images["train"]
    assert len({e["id"] for examples in parts.values() for e in examples}) == 40
    assert own().load("sft") == task.load("sft") and own().key == task.key
    for e in task.load("sft"):
        said = turns(task, *(t["text"] for t in e["turns"]))
        assert vrrl.well_formed(task, said) and task.exact(e, said[-1].attempt) and not any(task.exact(e, t.attempt) for t in said[:-2])


def test_own_data_decides_its_demonstrations(own):
    line = {"image": "picture1.png", "question": "and here?", "box": [1, 2, 13, 14]}
    assert own().key != own(json.dumps(line)).key


BAD = {"image": "picture1.png", "question": "where?", "box": [1, 2, 13, 14]}


@pytest.mark.parametrize("line, reason", [
    ("{not json", "JSON"), ("[]", "JSON object"), ({"image": "none.png"}, "does not exist"), ({"image": "/etc/passwd"}, "relative"),
    ({"image": "../x.png"}, "leaves"), ({"image": 3}, '"image"'), ({"image": "my.jsonl"}, "not a usable image"), ({"question": " "}, '"question"'),
    ({"question": 7}, '"question"'), ({"box": None}, '"box"'), ({"box": [1, 2, 3]}, '"box"'), ({"box": [1, 2, 3, "4"]}, '"box"'),
    ({"box": [1, 2, 3, True]}, '"box"'), ({"box": [5, 2, 5, 9]}, "empty"), ({"box": [5, 9, 8, 2]}, "empty"), ({"box": [-1, 2, 8, 9]}, "leaves its image of 40 x 30"),
    ({"box": [1, 2, 41, 9]}, "leaves its image"), ({"box": [1, 2, 8, 30.5]}, "leaves its image"), ({"id": "line-1"}, "used twice"), ({"id": 5}, '"id"'),
    ('{"image": "picture1.png", "question": "where?", "box": [1, 2, NaN, 9]}', '"box"'),
])
def test_a_bad_line_of_own_data_is_named_by_file_and_line(capsys, own, tmp_path, line, reason):
    line = line if isinstance(line, str) else json.dumps({**BAD, **line})
    said = fails(capsys, [], lambda words: own(line))
    assert f"{tmp_path / 'my.jsonl'}:2:" in said and reason in said


def test_own_data_that_cannot_be_divided_or_found_is_one_clear_line(capsys, own, home, tmp_path):
    assert "my.jsonl: none of its images falls into" in fails(capsys, [], lambda words: own(images=1))
    words = ["task=points", f"model={home / 'data' / 'random-model'}", f"data={tmp_path / 'none.jsonl'}"]
    fresh_policy(settings(home))
    assert "give data=FILE" in fails(capsys, words, lambda words: vrrl.Points(vrrl.read_config(words)[0]))


def test_a_box_that_no_point_of_the_scale_meets_is_one_clear_line(capsys, own):
    tiny = [json.dumps({**BAD, "image": f"picture{n}.png", "box": [2.1, 2.1, 2.2, 2.2]}) for n in range(20)]
    assert "raise points.scale" in fails(capsys, [], lambda words: own(*tiny).load("sft"))


def test_a_box_that_leaves_no_room_for_a_mistake_is_answered_at_once(own):
    full = [json.dumps({**BAD, "image": f"picture{n}.png", "box": [0, 0, 40, 30]}) for n in range(20)]
    traces = [e for e in own(*full).load("sft") if e["box"] == [0, 0, 40, 30]]
    assert traces and all(len(e["turns"]) == 2 or e["turns"][0]["text"].count("20") for e in traces)


# ---------------------------------------------------------------- turns and the protocol


@pytest.mark.parametrize("text, expected", [
    ("<ANSWER>up, left</ANSWER>", ("answer", None, ("up", "left"))), (" <ANSWER> UP\nleft </ANSWER>\n", ("answer", None, ("up", "left"))),
    ("<THINK>hole</THINK><ANSWER>up</ANSWER>", ("answer", "hole", ("up",))), ("<THINK></THINK> <ANSWER>up</ANSWER>", ("answer", "", ("up",))),
    ("<FINAL>up</FINAL>", ("final", None, ("up",))), ("<THINK>x</THINK><FINAL>up</FINAL>", ("final", "x", ("up",))),
    ("<THINK>a\nb < c</THINK><ANSWER>up</ANSWER>", ("answer", "a\nb < c", ("up",))),
    ("<THINK>x</THINK><ANSWER></ANSWER>", ("bad", "x", None)), ("<ANSWER>north</ANSWER>", ("bad", None, None)),
    *((text, ("bad", None, None)) for text in [
        "", "up", "<ANSWER></ANSWER>", "<ANSWER>up", "up</ANSWER>", "<ANSWER>up</FINAL>", "<ANSWER>up</ANSWER><FINAL>up</FINAL>", "<THINK>x</THINK>",
        "<ANSWER>up</ANSWER> done", "so <ANSWER>up</ANSWER>", "<ANSWER>up</ANSWER><THINK>x</THINK>", "<THINK>x</THINK><THINK>x</THINK><ANSWER>up</ANSWER>",
        "<ANSWER><ANSWER>up</ANSWER></ANSWER>", "<THINK><ANSWER>up</ANSWER></THINK><ANSWER>up</ANSWER>", "<THINK>x<ANSWER>up</ANSWER>",
        "<ANSWER>up</ANSWER><ANSWER>up</ANSWER>", "<answer>up</answer>", "<ANSWER>up1</ANSWER>", "<ANSWER>٣ up</ANSWER>", "<ANSWER>, ,</ANSWER>"]),
])
def test_a_turn_is_parsed_as_the_protocol_says(task, text, expected):
    assert vrrl.parse_turn(task, text) == expected


def test_any_sampled_ids_parse_without_an_exception(policy, task):
    rng, kinds, n = random.Random(0), Counter(), policy.banned.shape[0]
    tags, words = [policy.encode(t)[0] for t in vrrl.TAGS], [policy.encode(m)[0] for m in MOVES]
    for _ in range(10_000):  # some near the protocol, some any ids at all
        pool = rng.choice([range(n), [*words, *tags], words])
        ids = [*rng.choices(tags, k=rng.randint(0, 1)), *rng.choices(pool, k=rng.randint(0, 12)), *rng.choices(tags, k=rng.randint(0, 1)), policy.end_id]
        kind, thought, attempt = vrrl.parse_turn(task, policy.decode(ids))
        assert (attempt is None) == (kind == "bad")
        kinds[kind] += 1
    assert set(kinds) == {"answer", "final", "bad"}


@pytest.mark.parametrize("text", [
    "<THINK>" * 5000, "<THINK>" * 2000 + "</THINK>" * 2000, "<ANSWER>" + "up " * 50_000, "<" * 50_000, "<THINK>" + "<" * 50_000 + "</THINK>",
    "<THINK>" + "a " * 50_000 + "</THINK><ANSWER>up</ANSWER>", answer("up " * 50_000), answer("up," * 50_000 + "x"), "<ANSWER>" + "١٢٣" * 20_000 + "</ANSWER>",
    "<THINK>x</THINK>" * 3000, " " * 4000 + "x", "<THINK>x</THINK>" + " " * 4000 + "x", answer("up") + " " * 4000 + "x",
], ids=range(13))
def test_pathological_turns_are_parsed_quickly(task, text):
    started = time.perf_counter()
    vrrl.parse_turn(task, text)
    assert time.perf_counter() - started < 1


PROTOCOL = [  # (well-formed, its turns)
    (True, answer("up"), final("up")), (True, answer("up"), revise("left"), final("left")), (True, answer("up"), revise("left"), revise("down"), final("down")),
    (True, answer("up, left"), final("up left")),
    (False,), (False, final("up")), (False, answer("up")), (False, answer("up"), revise("left")),      # no attempt; no FINAL
    (False, revise("up"), final("up")), (False, answer("up"), answer("left"), final("left")),            # THINK in turn 1; none in a revision
    (False, answer("up"), revise("up"), final("up")), (False, answer("up"), revise("left"), revise("up"), final("up")),  # repeated
    (False, answer("up"), final("left")), (False, answer("up"), revise("left"), final("up")),            # commits something else than the last
    (False, answer("up"), "<THINK>x</THINK>" + final("up")), (False, answer("up"), final("up"), final("up")), (False, answer("up"), final("up"), revise("left")),
    (False, answer("up"), "nonsense"), (False, "nonsense", final("up")), (False, answer(""), final("")), (False, answer("up"), "<THINK>x</THINK>", final("up")),
]


@pytest.mark.parametrize("good, texts", [(good, texts) for good, *texts in PROTOCOL])
def test_well_formed_is_what_the_protocol_says(task, good, texts):
    assert vrrl.well_formed(task, turns(task, *texts)) == good


def test_an_unfinished_episode_is_well_formed_while_it_can_still_end_well(task):
    for good, *texts in PROTOCOL:
        said = turns(task, *texts)
        if good:
            assert all(vrrl.well_formed(task, said[:n], unfinished=True) for n in range(len(said) + 1))
        for n in range(len(said)):  # and never after a prefix that cannot
            ends = [[*said[:n + 1], *turns(task, *rest)] for rest in ([], [final(" ".join(said[n].attempt or ["up"]))])]
            if not vrrl.well_formed(task, said[:n + 1], unfinished=True):
                assert not any(vrrl.well_formed(task, end) for end in ends)


# ---------------------------------------------------------------- reward


def reward(task, cfg, *texts, stored=0, **changes):
    said = turns(task, *texts)
    episode = vrrl.Episode({"id": "x", "layout": LAKE}, [], None, replayed=said[:stored], turns=said[stored:])
    paper = dataclasses.replace(cfg.reward, form=0.1, bonus=0.1, unfinished=0.0)
    return vrrl.reward(task, episode, dataclasses.replace(paper, **changes))


REWARDS = [  # progress: right 1/4, right right 1/2, right right down 3/4, up 0
    ("exact at once", 1.0, answer(EXACT), final(EXACT)),
    ("exact by the other way", 1.0, answer("down down right right"), final("down down right right")),
    ("wrong then right", 1 + 0.1 * 0.75 - 0.01, answer("right"), revise(EXACT), final(EXACT)),
    ("worse then right", 1 + 0.1 * (1 - 0.5 * 0.5) - 0.02, answer("right right"), revise("up"), revise(EXACT), final(EXACT)),
    ("reflection is clipped at one", 1 + 0.1 - 0.03, answer("up"), revise("right right down"), revise("left"), revise(EXACT), final(EXACT)),
    ("wrong at once", 0.1, answer("right"), final("right")),
    ("wrong then better", 0.1 + 0.9 * 0.5, answer("right"), revise("right right down"), final("right right down")),
    ("wrong then worse", 0.1, answer("right"), revise("up"), final("up")),
    ("right then wrong", 0.1, answer(EXACT), revise("right"), final("right")),
    ("off the grid", 0.1, answer("up"), final("up")), ("off the grid, then to the goal", 0.1, answer("up " + EXACT), final("up " + EXACT)),
    ("into the hole", 0.1, answer("right down right down"), final("right down right down")),
    ("overshoot", 0.1, answer(EXACT + " up"), final(EXACT + " up")), ("overshoot off the grid", 0.1, answer(EXACT + " down"), final(EXACT + " down")),
    ("an overshoot has no progress", 0.1 + 0.9 * 0.25, answer(EXACT + " up"), revise("right"), final("right")),
    ("a longer way", 0.1, answer("right left " + EXACT), final("right left " + EXACT)),
    ("exact, uncommitted", 0.0, answer(EXACT)), ("repeated", 0.0, answer("right"), revise("right"), final("right")),
    ("commits another than the last", 0.0, answer(EXACT), revise("right"), final(EXACT)), ("malformed", 0.0, answer(EXACT), "nonsense"),
    ("final alone", 0.0, final(EXACT)),
]


@pytest.mark.parametrize("expected, texts", [row[1:2] + (row[2:],) for row in REWARDS], ids=[row[0] for row in REWARDS])
def test_reward_is_what_the_method_says(task, cfg, expected, texts):
    assert reward(task, cfg, *texts) == pytest.approx(expected)


@pytest.mark.parametrize("expected, texts", [row[1:2] + (row[2:],) for row in REWARDS], ids=[row[0] for row in REWARDS])
def test_reward_without_reflection_is_the_outcome_only(task, cfg, expected, texts):
    assert reward(task, cfg, *texts, reflection=False) == (0.0 if expected == 0 else 1.0 if expected >= 1 else 0.1)


def test_at_the_turn_limit_a_well_formed_episode_is_paid_what_the_setting_says(task, cfg):
    for texts, progress in (((answer("right"),), 0), ((answer("right"), revise("right right down")), 0.5), ((answer("right"), revise(EXACT)), 0.75)):
        assert reward(task, cfg, *texts) == 0
        assert reward(task, cfg, *texts, unfinished=0.3) == pytest.approx(0.3 + 0.7 * progress)
        assert reward(task, cfg, *texts, "nonsense", unfinished=0.3) == reward(task, cfg, *texts, texts[-1], unfinished=0.3) == 0


def test_reward_of_a_roll_in_counts_its_stored_attempts(task, cfg):
    for _, _, *texts in REWARDS:
        assert len({reward(task, cfg, *texts, stored=n) for n in range(len(texts))}) == 1


def test_reward_settings_weigh_its_parts(task, cfg):
    assert reward(task, cfg, answer("right"), revise(EXACT), final(EXACT), bonus=0.4, revision_cost=0.03) == pytest.approx(1 + 0.4 * 0.75 - 0.03)
    assert reward(task, cfg, answer("right"), final("right"), form=0.02) == pytest.approx(0.02)
    assert reward(task, cfg, answer("right right"), revise("up"), revise("right right down"), final("right right down"), worse=1) == pytest.approx(0.1 + 0.9 * 0.25)


# ---------------------------------------------------------------- policy


def test_a_conversation_has_the_ids_of_the_chat_template(policy, task):
    check_template(policy, task)
    cfg = dataclasses.replace(policy.cfg, protocol=dataclasses.replace(policy.cfg.protocol, system="say the path", question="check the path", feedback="find it"))
    other = vrrl.Navigation(cfg)
    check_template(vrrl.Policy(policy.model, policy.tokenizer, policy.processor, cfg), other)


def check_template(policy, task):
    text, picture, words = (lambda t: {"type": "text", "text": t}), {"type": "image"}, policy.cfg.protocol
    for e in demonstrations(policy, task, 3, 4):
        talk = [{"role": "system", "content": [text(words.system)]}] if words.system else []
        for n, turn in enumerate(e.turns):
            talk += [{"role": "user", "content": [picture, text(words.feedback)] if n else [text(words.question), picture]},
                     {"role": "assistant", "content": [text(turn.text)]}]
        pieces = policy.tokenizer.apply_chat_template(talk, tokenize=False).split("<|image_pad|>")
        sizes = [p.rows * p.cols for p in (*e.opening_pictures, *e.rest_pictures)]
        whole = "".join(piece + "<|image_pad|>" * size for piece, size in itertools.zip_longest(pieces, sizes, fillvalue=0) if piece != 0)
        assert len(pieces) == len(sizes) + 1 and policy.tokenizer.encode(whole, add_special_tokens=False) == [*e.opening, *e.rest]


def test_images_and_unknown_ids_have_no_probability(policy):
    logp = policy.log_softmax(torch.randn(5, 128))
    assert policy.image_id in policy.banned.nonzero() and policy.end_id not in policy.banned.nonzero()
    banned = [policy.image_id, policy.tokenizer.pad_token_id, *range(len(policy.tokenizer), logp.shape[1]),
              *policy.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"])]
    assert torch.isneginf(logp[:, banned]).all() and torch.allclose(logp.exp().sum(-1), torch.ones(5))
    allowed = [policy.end_id, *(i for word in [*vrrl.TAGS, *data_prep.VOCABULARY, *data_prep.POINTING] for i in policy.encode(word))]
    assert torch.isfinite(logp[:, allowed]).all()


def test_only_what_may_be_sampled_is_sampled(policy, task):
    hot = with_settings(policy, temperature=10.0)
    found = vrrl.play(hot, task, [vrrl.begin(hot, task, e) for e in task.load("train")[:8]], 8, 1, torch.Generator().manual_seed(0))
    ids = torch.tensor([i for e in found for i in e.rest])
    assert not hot.banned[ids].any() and len(ids.unique()) > 20


@pytest.mark.parametrize("size", [(48, 48), (80, 48), (50, 37), (16, 16), (7, 100)], ids=str)
def test_pictures_reach_the_vision_tower_as_from_the_library(policy, monkeypatch, size):
    rng, seen = np.random.default_rng(0), []
    images = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(3)]
    real = policy.model.model.get_image_features
    monkeypatch.setattr(policy.model.model, "get_image_features", lambda x, grid, **kw: seen.append((x, grid)) or real(x, grid, **kw))
    with torch.no_grad():
        policy.encode_pictures([policy.picture(i) for i in images])
    expected = policy.processor(images=images, return_tensors="pt")
    assert torch.equal(seen[0][1], expected["image_grid_thw"]) and furthest([seen[0][0]], [expected["pixel_values"]]) < 1e-5


@torch.no_grad()
def test_pictures_of_mixed_sizes_keep_their_order(policy):
    rng = np.random.default_rng(0)
    pictures = [policy.picture(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))) for h, w in ((48, 64), (32, 32), (64, 48), (48, 64), (32, 32))]
    images = pictures_of(policy, pictures)
    expected = policy.model.model.get_image_features(images["pixel_values"], images["image_grid_thw"], return_dict=True).pooler_output
    assert furthest([f for f, _ in policy.encode_pictures([*pictures, pictures[0]])], [*expected, expected[0]]) < 1e-5
    assert [p.rows * p.cols for p in pictures] == [len(f) for f in expected]


def test_positions_are_the_librarys(policy, task):
    rng = np.random.default_rng(0)
    a, b = (policy.picture(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))) for h, w in ((48, 80), (96, 32)))  # wide, then high
    head, between = policy.prompt("find the path", "check it")
    ids = [*policy.place(head, a), *policy.encode(answer(EXACT)), policy.end_id, *policy.place(between, b), *policy.encode("up")]
    batch = torch.tensor([ids])
    expected, _ = policy.model.model.get_rope_index(batch, batch.eq(policy.image_id).int(), image_grid_thw=pictures_of(policy, [a, b])["image_grid_thw"])
    found, advance = policy.positions(ids, iter([(a.rows, a.cols), (b.rows, b.cols)]))
    assert np.array_equal(found, expected[:, 0].numpy()) and advance == expected.max() + 1


@pytest.mark.parametrize("grad", [False, True])
def test_reading_turn_by_turn_equals_one_plain_forward(policy, task, grad):
    episodes = [e for e in demonstrations(policy, task, 4, 40) if len(e.turns) == 4][:3]  # rows of different length
    with torch.set_grad_enabled(grad):
        context, hidden = vrrl.Context(len(episodes), policy.device), [[] for _ in episodes]
        parts = [[(e.opening, e.opening_pictures)] + [p for t in e.turns for p in ((t.ids, []), (t.feedback, [t.picture] if t.picture else []))] for e in episodes]
        for step in itertools.zip_longest(*parts, fillvalue=([], [])):
            if any(ids for ids, _ in step):
                out = policy.extend(context, [ids for ids, _ in step], [p for _, seen in step for p in seen])
                for row, (ids, _) in enumerate(step):
                    hidden[row].append(out[row, : len(ids)])
    for e, found in zip(episodes, hidden):
        logits = policy.model.get_output_embeddings()(torch.cat(found)).detach()
        assert furthest([logits], [library_logits(policy, e)]) < 1e-4


def test_reading_token_by_token_equals_one_plain_forward(policy, task):
    episodes = demonstrations(policy, task, 3, 2)
    with torch.no_grad():
        context = vrrl.Context(2, policy.device)
        policy.extend(context, [e.opening for e in episodes], [p for e in episodes for p in e.opening_pictures])
        for column in range(max(len(e.turns[0].ids) for e in episodes)):
            on = torch.tensor([column < len(e.turns[0].ids) for e in episodes])
            policy.read_token(context, torch.tensor([e.turns[0].ids[column] if ok else 0 for e, ok in zip(episodes, on.tolist())]), on)
        logits = policy.model.get_output_embeddings()(context.last)
    expected = [library_logits(policy, e)[len(e.opening) + len(e.turns[0].ids) - 1] for e in episodes]
    assert furthest(list(logits), expected) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_equal_those_of_the_librarys_forward(policy, task, temperature):
    policy = with_settings(policy, temperature=temperature)
    for e in demonstrations(policy, task, 3, 3):
        assert furthest([policy.log_probs([e])[0][0].detach()], [library_log_probs(policy, e)]) < 1e-4


def test_batched_log_probs_equal_those_of_single_episodes(policy, task):
    episodes = [vrrl.demonstration(policy, task, e) for e in task.load("sft")[:12]]
    assert len({len(e.rest) for e in episodes}) > 3 and len({len(e.opening) for e in episodes}) > 1
    for part in (0, 1):  # log-probs, entropies
        assert furthest([x.detach() for x in policy.log_probs(episodes)[part]], [policy.log_probs([e])[part][0].detach() for e in episodes]) < 1e-4


def sampled(policy, task, monkeypatch, samples=3, max_turns=3, count=3):
    """Several-turn episodes from fresh starts and from roll-in prefixes, with and without a forced <THINK>."""
    talkative(monkeypatch)
    examples = task.load("train")
    starts = [vrrl.begin(policy, task, e) for e in examples[:count]]
    starts += [rolled_in(policy, task, e, force_think=n % 2 == 0) for n, e in enumerate(examples[count:2 * count])]
    return vrrl.play(policy, task, starts, samples, max_turns, torch.Generator().manual_seed(0))


def test_recorded_log_probs_equal_recomputed_ones(taught, task, monkeypatch):
    policy = with_settings(taught, max_new=40, temperature=0.8)
    episodes = sampled(policy, task, monkeypatch)
    assert sum(len(e.turns) == 3 for e in episodes) >= 6 and any(e.replayed and len(e.turns) == 3 for e in episodes)
    assert furthest([l.detach() for l in policy.log_probs(episodes)[0]], [recorded(e) for e in episodes]) < 1e-4
    assert furthest([library_log_probs(policy, e) for e in episodes], [recorded(e) for e in episodes]) < 1e-4


def test_sharing_a_groups_opening_changes_neither_log_probs_nor_gradients(taught, task, monkeypatch):
    episodes, results = sampled(taught, task, monkeypatch), []
    alone = [dataclasses.replace(e, question_ids=list(e.question_ids)) for e in episodes]  # nothing tells that they share it
    for batch in (alone, episodes):
        taught.model.zero_grad()
        logps, _ = taught.log_probs(batch)
        sum((n + 1) * l.sum() for n, l in enumerate(logps)).backward()
        results.append((logps, [p.grad.clone() for p in taught.model.parameters() if p.grad is not None]))
    taught.model.zero_grad()
    (a, da), (b, db) = results
    assert furthest([x.detach() for x in a], [x.detach() for x in b]) < 1e-4 and furthest(da, db) < 1e-3 * max(g.abs().max() for g in da)


def test_parts_side_by_side_give_the_same_gradients_and_values(taught, task):
    traces = demonstrations(taught, task, count=15)
    parts = [traces[:4], traces[4:7], traces[7:8], traces[8:13], traces[13:]]
    loss_of = lambda part: (torch.cat(taught.log_probs(part)[0]).sum(), len(part))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            assert data_prep.workers(taught) == min(threads, 2)
            values = data_prep.backward(taught, loss_of, parts)
            assert torch.get_num_threads() == threads  # the threads' own setting leaves this one alone
        finally:
            torch.set_num_threads(1)
        grads = [p.grad.clone() for p in taught.model.parameters() if p.grad is not None]
        taught.model.zero_grad()
        found.append((values, grads))
    (values, grads), *others = found
    assert len(grads) > 20 and [count for _, count in values] == [len(part) for part in parts] and len({loss for loss, _ in values}) == 5
    for other_values, other_grads in others:
        assert other_values == values and len(other_grads) == len(grads) and all(torch.equal(a, b) for a, b in zip(grads, other_grads))


def test_threads_keep_the_order_pass_errors_on_and_are_for_small_models_alone(taught):
    torch.set_num_threads(2)
    try:
        with data_prep.one_thread(taught):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        names = list(data_prep.in_threads(taught, lambda n: (time.sleep(0.05 * (n == 0)), n, threading.get_ident())[1:], range(6)))
        with pytest.raises(ZeroDivisionError):
            list(data_prep.in_threads(taught, lambda n: 1 / (3 - n), range(6)))
        large = SimpleNamespace(device=taught.device, model=torch.nn.Linear(4000, 4000))
        with data_prep.one_thread(large):
            assert torch.get_num_threads() == 2
        assert data_prep.workers(large) == 1 and {t for _, t in data_prep.in_threads(large, lambda n: (n, threading.get_ident()), range(3))} == {threading.get_ident()}
    finally:
        torch.set_num_threads(1)
    assert [n for n, _ in names] == list(range(6)) and len({t for _, t in names} - {threading.get_ident()}) == 2


def test_greedy_play_in_a_batch_equals_play_one_by_one(taught, task, monkeypatch):
    """Every text counts as an attempt that it decides, or now and then as the end: conversations differ in length."""
    starts = [vrrl.begin(taught, task, e) for e in task.load("train")[:8]] + [rolled_in(taught, task, e, force_think=True) for e in task.load("test_size")[:4]]
    monkeypatch.setattr(vrrl, "parse_turn", lambda task, text: (random.Random(text).choice(["answer", "answer", "bad"]), None, tuple(random.Random(text).choices(list(MOVES), k=4))))
    together = vrrl.play(taught, task, starts, 1, 4, None, greedy=True)
    alone = [vrrl.play(taught, task, [s], 1, 4, None, greedy=True)[0] for s in starts]
    assert [e.rest for e in together] == [e.rest for e in alone] and len({len(e.turns) for e in together}) > 1


def test_play_groups_its_samples_by_start_and_leaves_the_starts_alone(taught, task):
    examples = task.load("train")[:3]
    starts = [vrrl.begin(taught, task, e) for e in examples]
    episodes = vrrl.play(taught, task, starts, 4, 2, torch.Generator().manual_seed(0))
    assert [e.example["id"] for e in episodes] == [x["id"] for x in examples for _ in range(4)]
    assert not any(s.turns for s in starts) and len({id(e.turns) for e in episodes}) == 12


def test_play_follows_a_turn_with_the_picture_of_its_attempt(taught, task):
    for e in vrrl.play(taught, task, [vrrl.begin(taught, task, x) for x in task.load("train")[:4]], 4, 3, torch.Generator().manual_seed(0)):
        for n, t in enumerate(e.turns):
            assert t.ids.count(taught.end_id) <= 1 and len(t.ids) == len(t.logps) == len(t.trained) <= taught.cfg.policy.max_new
            if n + 1 < len(e.turns):
                assert t.kind == "answer" and np.array_equal(t.picture.pixels, np.asarray(task.feedback(e.example, t.attempt)))
            else:
                assert t.picture is None and not t.feedback and (t.kind != "answer" or n + 1 == 3)


def test_a_turn_that_is_cut_off_is_bad(taught, task):
    short = with_settings(taught, max_new=4)  # <ANSWER> and three moves: no room for the end
    assert all([t.kind for t in e.turns] == ["bad"] for e in vrrl.play(short, task, [vrrl.begin(short, task, e) for e in task.load("test_size")], 2, 3, torch.Generator()))


def test_training_play_ends_where_the_reward_is_lost(taught, task, monkeypatch):
    monkeypatch.setattr(vrrl, "parse_turn", lambda task, text: ("answer", None, ("up",)))  # a revision without THINK
    start = [vrrl.begin(taught, task, task.load("train")[0])]
    for training, expected in ((True, 2), (False, 3)):
        episodes = vrrl.play(taught, task, start, 8, 3, torch.Generator().manual_seed(0), training=training)
        assert max(len(e.turns) for e in episodes) == expected


def test_a_frozen_vision_tower_gets_no_gradient_and_a_free_one_does(policy, task):
    for frozen in (True, False):
        policy.freeze_vision(frozen)
        policy.model.zero_grad()
        torch.cat(policy.log_probs(demonstrations(policy, task, 3, 2))[0]).sum().backward()
        grads = [p.grad for p in policy.model.model.visual.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert bool(grads) != frozen
    policy.model.zero_grad()


# ---------------------------------------------------------------- loss


class Chooses:
    """A random.Random whose every draw of k is this one."""

    def __init__(self, k):
        self.k = k

    def randint(self, low, high):
        assert low <= self.k <= high
        return self.k


def leaf(*shape, seed=0):
    return (-torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()


def gradient(logp, weights, advantage=0.7, kl=0.0, reference=None, rollouts=4):
    loss = vrrl.policy_loss([logp], [logp.detach() if reference is None else reference], [advantage], [torch.as_tensor(weights, dtype=torch.float64)], kl, rollouts)
    return torch.autograd.grad(loss, logp)[0]


def test_masked_turns_get_no_gradient_and_the_others_what_they_get_unmasked(policy, task):
    e = next(e for e in demonstrations(policy, task, 4, 40) if len(e.turns) == 4)
    e = scripted(policy, task, e.example, *(t.text for t in e.turns))
    number = torch.tensor([t for _, t in e.actions])
    logp = leaf(len(number))
    plain = gradient(logp, vrrl.turn_weights(e, "none", None))
    assert torch.allclose(plain, torch.full_like(plain, -0.7 / 4))
    for k in range(1, len(e.turns) + 1):
        found = gradient(logp, vrrl.turn_weights(e, "random", Chooses(k)))
        assert torch.all(found[number < k] == 0) and torch.equal(found[number >= k], plain[number >= k]) and (number >= k).any()


def test_expected_masking_is_the_average_of_random_masking(policy, task):
    """In the gradient, not only in the weights: it would fail if the loss were divided by the unmasked tokens."""
    for e in demonstrations(policy, task, 2, 10):
        logp = leaf(len(e.actions))
        over_k = torch.stack([gradient(logp, vrrl.turn_weights(e, "random", Chooses(k))) for k in range(1, len(e.turns) + 1)])
        assert torch.allclose(over_k.mean(0), gradient(logp, vrrl.turn_weights(e, "expected", None)))


def test_the_first_unmasked_turn_is_drawn_evenly_from_all_turns(policy, task):
    e = next(e for e in demonstrations(policy, task, 4, 40) if len(e.turns) == 4)
    e = scripted(policy, task, e.example, *(t.text for t in e.turns))
    rng = random.Random(0)
    firsts = Counter(next(t for w, (_, t) in zip(vrrl.turn_weights(e, "random", rng), e.actions) if w) for _ in range(4000))
    assert set(firsts) == {1, 2, 3, 4} and all(abs(n - 1000) < 130 for n in firsts.values())


@pytest.mark.parametrize("mask", ["none", "random", "expected"])
def test_a_roll_in_is_not_masked_and_only_its_sampled_tokens_are_actions(taught, task, monkeypatch, mask):
    for e in sampled(taught, task, monkeypatch):
        if e.replayed:
            assert set(vrrl.turn_weights(e, mask, random.Random(0))) == {1.0}
            forced = len(taught.encode("<THINK>")) if e.force_think else 0
            at = list(itertools.accumulate((len(t.ids) + len(t.feedback) for t in e.turns), initial=0))
            assert [c for c, _ in e.actions] == [at[n] + i for n, t in enumerate(e.turns) for i in range(forced if n == 0 else 0, len(t.ids))]


@pytest.mark.parametrize("std_norm", [False, True])
def test_advantages_of_a_group_sum_to_zero(std_norm):
    a = vrrl.advantages(torch.rand(7, 5, dtype=torch.float64), std_norm)
    assert torch.allclose(a.sum(1), torch.zeros(7, dtype=torch.float64)) and a.abs().min() > 0


def test_the_baseline_is_the_mean_of_the_others():
    rewards = torch.rand(3, 4, dtype=torch.float64)
    expected = torch.tensor([[row[i] - (row.sum() - row[i]) / 3 for i in range(4)] for row in rewards], dtype=torch.float64)
    assert torch.allclose(vrrl.advantages(rewards), expected)


def test_std_norm_divides_by_the_groups_deviation():
    rewards = torch.rand(3, 4, dtype=torch.float64)
    assert torch.allclose(vrrl.advantages(rewards, True), vrrl.advantages(rewards) / rewards.std(1, keepdim=True), atol=1e-4)


@pytest.mark.parametrize("group, kept", [(2, 1), (3, 1), (2, 2)])
def test_the_mean_gradient_is_exact_on_a_bandit(group, kept):
    """Two turns, 3 x 2 actions, all groups of rollouts enumerated: E[gradient of the loss] = - gradient of E[R], of the turns from `kept` on."""
    first, second = leaf(3, seed=1), leaf(3, 2, seed=2)
    rewards = torch.tensor([[1.0, 0.2], [0.0, 0.7], [0.1, 0.4]], dtype=torch.float64)
    logp1, logp2 = first.log_softmax(0), second.log_softmax(1)
    logp = lambda a, b: torch.stack([logp1[a], logp2[a, b]])
    trajectories = list(itertools.product(range(3), range(2)))
    value = sum(logp(a, b).sum().exp() * rewards[a, b] for a, b in trajectories)
    truth = list(torch.autograd.grad(value, [first, second], retain_graph=True))
    if kept == 2:  # a mask that is the same for all rollouts: first answers leave the loss
        truth[0] = torch.zeros(3, dtype=torch.float64)
    mask = torch.tensor([float(kept == 1), 1.0], dtype=torch.float64)
    mean = 0.0
    for chosen in itertools.product(trajectories, repeat=group):
        logps = [logp(a, b) for a, b in chosen]
        advantage = vrrl.advantages(torch.stack([rewards[a, b] for a, b in chosen])[None])[0]
        weight = sum(l.sum() for l in logps).exp().detach()
        mean = mean + weight * vrrl.policy_loss(logps, logps, advantage.tolist(), [mask] * group, 0.0, group)
    found = torch.autograd.grad(mean, [first, second], allow_unused=True)
    assert furthest([torch.zeros_like(t) if f is None else -f for f, t in zip(found, truth)], truth) < 1e-6


def test_the_kl_term_is_zero_at_the_reference_and_pulls_back_to_it():
    reference = leaf(6).detach()
    same = reference.clone().requires_grad_()
    assert vrrl.policy_loss([same], [reference], [0.0], [torch.zeros(6)], 0.5, 1).item() == 0 and gradient(same, torch.zeros(6), kl=0.5, reference=reference).abs().max() == 0
    away = (reference + torch.tensor([0.5, -0.3, 0.1, -0.2, 1.0, -0.6])).requires_grad_()
    r = (reference - away).exp()  # pi_SFT / pi
    assert vrrl.policy_loss([away], [reference], [0.0], [torch.zeros(6)], 0.5, 1).item() == pytest.approx(0.5 * (r - r.log() - 1).sum().item())
    # Descent lowers what is above the reference and raises what is below; masked tokens (weight 0) included.
    assert torch.equal(gradient(away, torch.zeros(6), advantage=0.0, kl=0.5, reference=reference).sign(), (away - reference).sign())


def test_micro_batches_sum_to_the_batchs_loss():
    logps, refs, weights = [leaf(n, seed=n) for n in (3, 5, 2, 4)], [leaf(n, seed=n + 9).detach() for n in (3, 5, 2, 4)], [torch.rand(n).double() for n in (3, 5, 2, 4)]
    loss = lambda at: vrrl.policy_loss(logps[at], refs[at], [0.3, -1.0, 0.5, 0.2][at], weights[at], 0.1, 8)
    assert torch.allclose(loss(slice(0, 1)) + loss(slice(1, 4)), loss(slice(0, 4)))


# ---------------------------------------------------------------- roll-ins


def buffer(cfg, **changes):
    return vrrl.RollInBuffer(dataclasses.replace(cfg.buffer, **{"start": 1, "max_attempts": 2, "per_question": 3, **changes}))


@pytest.fixture(scope="session")
def wrong(policy, task):
    """Episodes whose four attempts are all wrong, of different questions."""
    return [scripted(policy, task, e, answer("up up up"), revise("up up down"), revise("down up down"), revise("down up up"), final("down up up")) for e in task.load("train")[:8]]


@pytest.fixture(scope="session")
def right(policy, task):
    """Episodes that are exact at once."""
    said = [(e, e["turns"][-2]["text"]) for e in task.load("sft") if len(e["turns"]) == 2][:8]
    return [scripted(policy, task, e, text, text.replace("ANSWER", "FINAL")) for e, text in said]


def test_the_buffer_is_first_in_first_out(cfg, task, wrong):
    stored = buffer(cfg, size=3)
    for step, e in enumerate(wrong[:5]):
        stored.add(task, e, step, random.Random(0))
    assert [(r.step, r.example["id"]) for r in stored.entries] == [(n, wrong[n].example["id"]) for n in (2, 3, 4)]


def test_the_buffer_keeps_few_prefixes_of_one_question(cfg, task, wrong):
    stored = buffer(cfg, size=4, per_question=2)
    for e in [wrong[0]] * 5:
        stored.add(task, e, 0, random.Random(0))
    assert len(stored.entries) == 2
    for e in wrong[1:4]:
        stored.add(task, e, 0, random.Random(0))
    assert len(stored.entries) == 4  # full: the first of the two has left
    stored.add(task, wrong[0], 0, random.Random(0))
    assert stored.entries[-1].example["id"] == wrong[0].example["id"]  # there is room again


def test_stale_prefixes_are_not_drawn(cfg, task, wrong):
    stored = buffer(cfg, max_age=10)
    for step, e in enumerate(wrong[:4]):
        stored.add(task, e, 5 * step, random.Random(0))  # steps 0, 5, 10, 15
    drawn = lambda step: {s.example["id"] for s in (stored.draw(step, random.Random(n)) for n in range(60)) if s}
    assert drawn(10) == {e.example["id"] for e in wrong[:4]}
    assert drawn(20) == {e.example["id"] for e in wrong[2:4]} and drawn(26) == set()


def test_roll_ins_start_when_enough_fresh_prefixes_are_stored(cfg, task, wrong):
    stored = buffer(cfg, start=3, max_age=10)
    for n, e in enumerate(wrong[:4]):
        assert (stored.draw(0, random.Random(0)) is None) == (n < 3)
        stored.add(task, e, 0, random.Random(0))
    assert stored.draw(10, random.Random(0)) and stored.draw(11, random.Random(0)) is None


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_wrong_prefixes_are_drawn_as_often_as_the_setting_says(cfg, task, wrong, right, share):
    stored, rng = buffer(cfg, wrong_share=share), random.Random(0)
    for e in wrong[:2] + right:  # few wrong, many right: the mix must not depend on it
        stored.add(task, e, 0, rng)
    drawn = [stored.draw(0, rng) for _ in range(2000)]
    assert abs(sum(not r.right for r in drawn) / 2000 - share) < 0.04


def test_a_buffer_of_one_kind_only_is_still_drawn_from(cfg, task, right):
    stored = buffer(cfg, wrong_share=1.0)
    stored.add(task, right[0], 0, random.Random(0))
    assert stored.draw(0, random.Random(0)) is not None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_prefix_has_at_most_so_many_attempts(cfg, task, wrong, most):
    stored, rng = buffer(cfg, max_attempts=most, per_question=1000), random.Random(0)
    for _ in range(60):
        stored.add(task, wrong[0], 0, rng)
    assert {len(r.turns) for r in stored.entries} == set(range(1, most + 1))


def test_only_well_formed_prefixes_of_fresh_episodes_with_a_shown_attempt_enter(cfg, policy, task, wrong):
    example, rng = task.load("train")[0], random.Random(0)
    never = [rolled_in(policy, task, example), scripted(policy, task, example, "nonsense"), scripted(policy, task, example, revise("up"), final("up")),
             scripted(policy, task, example, final("up"))]
    never[0].turns = scripted(policy, task, example, answer("left"), final("left")).turns  # a roll-in: its fresh turns alone look like an episode
    unseen = scripted(policy, task, example, answer("up"))
    unseen.turns[0].picture, unseen.turns[0].feedback = None, ()  # ended at the turn limit: no decision follows
    stored = buffer(cfg)
    for e in [*never, unseen] * 4:
        stored.add(task, e, 0, rng)
    assert not stored.entries
    for _ in range(20):  # well-formed up to the first attempt only
        stored = buffer(cfg)
        stored.add(task, scripted(policy, task, example, answer("up"), answer("left"), final("left")), 0, rng)
        assert len(stored.entries[0].turns) == 1


def test_a_prefix_is_labelled_by_its_last_attempt_and_forced_to_think_after_a_wrong_one(cfg, policy, task):
    example = next(e for e in task.load("sft") if len(e["turns"]) == 2)
    path, found = example["turns"][0]["text"][8:-9], set()
    e = scripted(policy, task, example, answer("up up up"), revise(path), final(path))
    stored, rng = buffer(cfg, per_question=100), random.Random(0)
    for _ in range(30):
        stored.add(task, e, 7, rng)
    for r in stored.entries:
        start = r.start(policy, task)
        assert r.right == task.exact(example, start.attempts[-1]) == (not start.force_think) and r.step == 7
        found.add(r.right)
    assert found == {True, False}


def test_a_roll_in_goes_on_exactly_where_the_stored_episode_stopped(cfg, taught, task, monkeypatch):
    # Every text counts as an attempt that it decides, so that a stored turn can be read again.
    monkeypatch.setattr(vrrl, "parse_turn", lambda task, text: ("answer", "hole", tuple(random.Random(text).choices(list(MOVES), k=5))))
    past = vrrl.play(taught, task, [vrrl.begin(taught, task, e) for e in task.load("train")[:6]], 2, 3, torch.Generator().manual_seed(0))
    monkeypatch.setattr(vrrl, "well_formed", lambda *args, **kwargs: True)  # here the first attempt has a THINK
    stored, rng = buffer(cfg), random.Random(0)
    for e in past:
        before = [len(t.ids) for t in e.turns]
        stored.add(task, e, 0, rng)
        assert not e.replayed and [len(t.ids) for t in e.turns] == before  # what will be trained stays whole
    assert len(stored.entries) >= 8
    pixels = lambda e: [p.pixels.tolist() for p in e.opening_pictures]
    for r in stored.entries:
        source = next(e for e in past if r.example is e.example and r.turns[0] is e.turns[0].ids)
        start, cut = r.start(taught, task), len(r.turns)
        upto = sum(len(t.ids) + len(t.feedback) for t in source.turns[:cut])
        assert start.opening == source.opening + source.rest[:upto] and start.rest == [] and start.force_think == (not r.right)
        assert pixels(start) == [p.pixels.tolist() for p in [*source.opening_pictures, *source.rest_pictures[:cut]]]
        for e in vrrl.play(taught, task, [start], 2, 3, torch.Generator().manual_seed(1)):
            assert e.opening == start.opening and e.replayed == start.replayed and e.turns


def test_a_buffer_comes_back_from_a_checkpoint_as_it_was(cfg, policy, task, wrong, right):
    stored, again = buffer(cfg), buffer(cfg)
    for step, e in enumerate(wrong + right):
        stored.add(task, e, step, random.Random(step))
    again.restore(json.loads(json.dumps(stored.state())), task.load("sft") + task.load("train"))
    same = lambda r: (r.start(policy, task).opening, [p.pixels.tolist() for p in r.start(policy, task).opening_pictures], r.right, r.step)
    assert [same(r) for r in again.entries] == [same(r) for r in stored.entries] and len(stored.entries) == 16
    assert [again.draw(9, random.Random(n)).example["id"] for n in range(20)] == [stored.draw(9, random.Random(n)).example["id"] for n in range(20)]


def test_a_roll_ins_fresh_turns_get_the_whole_turn_budget(taught, task, monkeypatch):
    assert max(len(e.turns) for e in sampled(taught, task, monkeypatch) if e.replayed) == 3


def test_a_forced_think_has_the_learnt_ids_and_is_not_an_action(taught, task, monkeypatch):
    forced = taught.encode("<THINK>")
    learnt = next(t.ids for e in demonstrations(taught, task, 3) for t in e.turns if t.thought is not None)
    assert learnt[: len(forced)] == forced
    for e in sampled(with_settings(taught, temperature=10.0), task, monkeypatch):  # so hot that it seldom says <THINK> by itself
        first = e.turns[0]
        assert first.trained[: len(forced)] == [not e.force_think] * len(forced) and all(first.trained[len(forced):]) and all(all(t.trained) for t in e.turns[1:])
        assert not e.force_think or first.ids[: len(forced)] == forced
    free = [e.turns[0].ids[: len(forced)] == forced for e in sampled(with_settings(taught, temperature=10.0), task, monkeypatch) if not e.force_think]
    assert not all(free)


# ---------------------------------------------------------------- SFT


def test_turns_that_are_shown_and_not_taught_have_no_actions(policy, task):
    seen = Counter()
    for record in task.load("sft"):
        e = vrrl.demonstration(policy, task, record)
        taught = [[t.ids[i] for i in range(len(t.ids)) if t.trained[i]] for t in e.turns]
        assert len(e.actions) == sum(map(len, taught))
        for turn, ids, given in zip(e.turns, taught, record["turns"]):
            expected = {True: turn.ids, False: [], "think": policy.encode(f"<THINK>{turn.thought}</THINK>")}[given["loss"]]
            assert ids == expected and turn.ids == [*policy.encode(given["text"]), policy.end_id]
            seen[given["loss"]] += 1
    assert set(seen) == {True, False, "think"}


def test_wrong_answers_are_never_taught(policy, task):
    for record in task.load("sft"):
        e = vrrl.demonstration(policy, task, record)
        for n, turn in enumerate(e.turns, 1):
            if not task.exact(record, turn.attempt):
                at = turn.ids.index(policy.encode("<ANSWER>")[0])
                assert not any(turn.trained[at:])


def test_sft_lowers_the_loss(taught, lessons):
    mean = lambda part: sum(m["loss"] for m in part) / len(part)
    assert mean(lessons[-5:]) < 0.6 * mean(lessons[:5]) and lessons[0]["step"] == 1


def test_passes_over_the_items_are_whole_and_in_new_orders():
    passed = [i for step in range(1, 11) for i in vrrl.items_of(list(range(10)), 4, step, 0)]
    assert all(sorted(passed[n:n + 10]) == list(range(10)) for n in (0, 10, 20, 30)) and passed[:10] != passed[10:20]


# ---------------------------------------------------------------- RL


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_rl_gives_every_rollout_its_own_advantage_mask_and_reference(home, taught, task, monkeypatch, kl):
    cfg = settings(home, "rl.steps=3", f"rl.kl={kl}", "rl.rho=0.5", "buffer.start=1", "rl.questions=6", "rl.samples=3", "rl.micro=7", "rl.lr=0.001", "rl.max_turns=3")
    policy = vrrl.Policy(copy.deepcopy(taught.model), taught.tokenizer, taught.processor, cfg)
    score = lambda task, e, cfg: sum(e.rest) % 7 / 10 + 0.1  # spread out, so that nearly every group has signal
    batches, losses, lines, real = [], [], [], (policy.log_probs, vrrl.policy_loss)
    monkeypatch.setattr(vrrl, "reward", score)
    monkeypatch.setattr(policy, "log_probs", lambda batch: batches.append(batch) or real[0](batch))
    played, play = [], vrrl.play
    monkeypatch.setattr(vrrl, "play", lambda *args, **kwargs: played.append(play(*args, **kwargs)) or played[-1])
    monkeypatch.setattr(vrrl, "policy_loss", lambda *args: losses.append(args) or real[1](*args))
    vrrl.rl(policy, taught, task, cfg, Listener(lines))
    assert len(batches) == len(losses) >= 6 and any(e.replayed for b in batches for e in b)
    groups = {id(e): step[n // 3 * 3:n // 3 * 3 + 3] for step in played for n, e in enumerate(step)}
    assert all(len({id(x.question_ids) for x in group}) == 1 for group in groups.values())
    assert all(max(len(e.turns) for step in played for e in step if bool(e.replayed) == rolled) <= cfg.rl.max_turns for rolled in (True, False))
    assert len({id(e) for b in batches for e in b}) == sum(map(len, batches))  # each kept rollout once
    for batch, (logps, refs, advantage, weights, weight, rollouts) in zip(batches, losses):
        r = lambda e: score(task, e, None)
        expected = [r(e) - sum(r(x) for x in groups[id(e)] if x is not e) / 2 for e in batch]
        assert advantage.tolist() == pytest.approx(expected, abs=1e-5)
        assert (weight, rollouts) == (kl, 18)  # all sampled rollouts, whatever is kept or masked
        assert all(len(l) == len(w) == len(e.actions) for l, w, e in zip(logps, weights, batch))
        assert all(w.min() == 1 for w, e in zip(weights, batch) if e.replayed)
        if kl:
            assert furthest(refs, taught.log_probs(batch)[0]) < 1e-4
    assert any(w.min() == 0 for _, _, _, weights, _, _ in losses for w in weights)
    assert abs(lines[0]["kl"]) < 1e-5 < lines[-1]["kl"]  # the policy leaves the reference, which stays
    assert [m["rollouts"] for m in lines] == [18, 36, 54] and {"reward", "first", "final", "kept", "rollins"} <= set(lines[0])


def test_a_vision_tower_in_training_looks_at_every_picture_anew(home, taught, task, monkeypatch):
    """Roll-in pictures live on over several steps: features that the frozen reference keeps must not reach the policy."""
    cfg = settings(home, "rl.steps=3", "rl.kl=0.1", "rl.freeze_vision=no", "rl.rho=0.5", "buffer.start=1", "rl.questions=6", "rl.samples=3")
    policy = vrrl.Policy(copy.deepcopy(taught.model), taught.tokenizer, taught.processor, cfg)
    score, real, rolled = (lambda task, e, cfg: sum(e.rest) % 7 / 10 + 0.1), policy.log_probs, []

    def log_probs(batch):
        assert all(f.requires_grad for e in batch for f, _ in policy.encode_pictures([*e.opening_pictures, *e.rest_pictures]))
        rolled.extend(e for e in batch if e.replayed)
        return real(batch)

    monkeypatch.setattr(vrrl, "reward", score)
    monkeypatch.setattr(policy, "log_probs", log_probs)
    vrrl.rl(policy, taught, task, cfg, vrrl.Log())
    assert rolled


def test_a_step_without_signal_changes_nothing(home, taught, task, monkeypatch):
    cfg = settings(home, "rl.steps=1", "rl.questions=2", "rl.samples=2")
    policy = vrrl.Policy(copy.deepcopy(taught.model), taught.tokenizer, taught.processor, cfg)
    for constant in (0.0, 0.1, 1.0):
        monkeypatch.setattr(vrrl, "reward", lambda *args: constant)
        lines = []
        vrrl.rl(policy, taught, task, cfg, Listener(lines))
        assert lines[0]["kept"] == 0
    assert furthest(policy.model.parameters(), taught.model.parameters()) == 0


def test_rl_raises_a_reward_that_is_easy_to_raise(home, taught, task, monkeypatch):
    """End to end: the sign of the loss, the pairing of rewards and log-probs, and the update. The reward asks for `up` first."""
    cfg = settings(home, "method=rl", "rl.steps=12", "rl.questions=4", "rl.samples=8", "rl.max_turns=1", "rl.lr=0.003", "rl.micro=32")
    policy = vrrl.Policy(copy.deepcopy(taught.model), taught.tokenizer, taught.processor, cfg)
    up, lines = policy.encode("up")[0], []
    monkeypatch.setattr(vrrl, "reward", lambda task, e, cfg: float(up in e.rest[:3]))
    vrrl.rl(policy, taught, task, cfg, Listener(lines))
    assert lines[-1]["reward"] > 0.85 > 0.7 > lines[0]["reward"]


# ---------------------------------------------------------------- evaluation and report


def test_a_saved_model_evaluates_to_the_same_numbers(taught, task, cfg, tmp_path):
    vrrl.save_policy(taught, tmp_path / "model")
    loaded = vrrl.load_policy(str(tmp_path / "model"), cfg)
    rows, fixed, _ = vrrl.evaluate(taught, task, cfg)
    again, fixed_again, _ = vrrl.evaluate(loaded, task, cfg)
    assert rows == again and fixed == fixed_again and [r["split"] for r in rows] == list(task.SPLITS)


def test_evaluation_counts_what_happened(policy, task, home, monkeypatch):
    """Play is replaced by scripts of known outcome: solved at once, repaired, broken, failed."""
    cfg = settings(home, "eval.maps=4")
    paths = {}

    def script(policy, task, starts, samples, max_turns, generator, greedy=False, training=False):
        episodes = []
        for n, s in enumerate(starts):
            path = paths.setdefault(s.example["id"], " ".join(data_prep.sample_shortest_path(s.example["layout"], random.Random(0))))
            bad = "up down up down up"
            texts = [[answer(path), final(path)], [answer(bad), revise(path), final(path)], [answer(path), revise(bad)], [answer(bad), final(bad)]][n % 4]
            texts = [revise(path), final(path)] if s.replayed else texts
            episodes.append(dataclasses.replace(s, turns=scripted(policy, task, s.example, *texts).turns))
        return episodes

    monkeypatch.setattr(vrrl, "play", script)
    rows, fixed, _ = vrrl.evaluate(policy, task, cfg)
    for row in rows:
        expected = dict(n=4, first=0.5, final=0.5, committed=0.5, repair_own=0.5, repair_fixed=1.0, n_fixed=2, commit=0.75, turns=2.25, sampled_final=0.5)
        assert {k: row[k] for k in expected} == expected and row["break"] == 0.5
        assert row["after_turn"][:2] == [0.5, 0.5] and (row["first_by_map"], row["final_by_map"]) == ("1010", "1100")
    assert [row["ood"] for row in rows] == [False, True, True, True] and all(len(texts) == 2 for texts in fixed.values())


def test_the_paired_difference_is_that_of_the_out_of_distribution_maps():
    rows = lambda *bits: [{"ood": n > 0, "split": n, "final_by_map": b} for n, b in enumerate(bits)]
    old, new = rows("1111", "0000" * 20, "0101" * 20), rows("0000", "1100" * 20, "0101" * 20)
    middle, low, high = data_prep.paired_difference(new, old, "final")
    assert middle == pytest.approx(0.25) and low < 0.25 < high and data_prep.paired_difference(old, old, "final") == (0, 0, 0)


@pytest.mark.parametrize("right, n, low, high", [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_intervals_are_wilsons(right, n, low, high):
    assert data_prep.wilson(right / n, n) == pytest.approx((low, high), abs=2e-3)


def test_curves_of_a_run_without_any_step_are_drawn(tmp_path):
    """method=sft sft.steps=0 is allowed: the start model alone, evaluated."""
    (tmp_path / "metrics.jsonl").write_text("")
    data_prep.curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_curves_of_a_step_without_fresh_episodes_are_drawn(tmp_path):
    """With few questions a step, all may be roll-ins; the run must not die after its training."""
    rest = ("reward", "first", "final", "rollin_repair", "commit", "well_formed", "entropy", "kl", "grad_norm", "kept", "rollins", "buffer_wrong", "buffer_age")
    lines = [{"stage": "rl", "step": n, "turns": turns, **dict.fromkeys(rest)} for n, turns in enumerate([{"1": 3, "2": 5}, {}, {"2": 8}])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data_prep.curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000


# ---------------------------------------------------------------- the study


def test_probes_show_what_they_say_instead_of_the_true_feedback(task):
    failed = [(e, ("up",) * n) for n, e in enumerate(task.load("test_id")[:3], 1)]
    shown = data_prep.probes(task, failed)
    same = lambda a, b: a.size == b.size and a.tobytes() == b.tobytes()
    for (example, attempt), (after, other) in zip(failed, failed[1:] + failed[:1]):
        assert same(shown["undrawn"](example, attempt), task.image(example))
        assert same(shown["other_attempt"](example, attempt), task.feedback(example, other))
        assert same(shown["other_image"](example, attempt), task.feedback(after, other))
    alone = data_prep.probes(task, failed[:1])
    assert same(alone["other_attempt"](*failed[0]), task.image(failed[0][0]))


def test_a_probe_changes_only_the_pictures_of_the_feedback(policy, task):
    example, ids = task.load("test_id")[0], [*policy.encode(answer("up up")), policy.end_id]
    view = copy.copy(task)
    view.feedback = lambda e, a: task.image(e)
    true, shown = vrrl.resume(policy, task, example, [ids]), vrrl.resume(policy, view, example, [ids])
    assert true.opening == shown.opening and true.replayed[0].attempt == ("up", "up")
    assert np.array_equal(shown.replayed[0].picture.pixels, np.asarray(task.image(example)))
    assert not np.array_equal(true.replayed[0].picture.pixels, shown.replayed[0].picture.pixels)


def test_repair_under_the_probes_is_what_play_with_their_pictures_gives(policy, task, home, monkeypatch):
    """A stand-in repairs exactly where the picture before it is the true one."""
    cfg = settings(home, "eval.maps=4", "eval.probes=yes")

    def script(policy, view, starts, samples, max_turns, generator, greedy=False, training=False):
        episodes = []
        for s in starts:
            path = " ".join(data_prep.sample_shortest_path(s.example["layout"], random.Random(0)))
            looks = s.replayed and np.array_equal(s.replayed[0].picture.pixels, np.asarray(task.feedback(s.example, s.replayed[0].attempt)))
            texts = [revise(path), final(path)] if looks else [revise("down up down up"), final("down up down up")] if s.replayed else [answer([*MOVES][len(episodes) % 4])]
            episodes.append(dataclasses.replace(s, turns=scripted(policy, task, s.example, *texts).turns))
        return episodes

    monkeypatch.setattr(vrrl, "play", script)
    for row in vrrl.evaluate(policy, task, cfg)[0]:
        assert row["repair_fixed"] == 1 and row["n_fixed"] > 1, row
        assert [row[f"repair_{p}"] for p in data_prep.PROBES] == [0, 0, 0]


def cells(**differences):
    """Rows of a made-up study: {method: string of outcomes}, the same in two seeds and out-of-distribution splits."""
    return {m: [{"method": m, "seed": s, "split": n, "ood": n != "id", "final_by_map": bits} for s in (0, 1) for n in ("id", "size", "both")]
            for m, bits in differences.items()}


def test_differences_of_a_study_are_paired_by_seed_and_map():
    rows = cells(new="1100" * 25, old="0100" * 25, flat="1111" * 25)
    middle, low, high = data_prep.seed_difference(rows["new"], rows["old"], "final")
    assert middle == pytest.approx(0.25) and 0.15 < low < 0.25 < high < 0.35
    assert data_prep.seed_difference(rows["new"], rows["new"], "final") == (0, 0, 0)
    only_seed_1 = [r for r in rows["old"] if r["seed"] == 1]
    assert data_prep.seed_difference([r for r in rows["new"] if r["seed"] == 0], only_seed_1, "final") is None, "other seeds are no pairs"
    rows["old"][4]["final_by_map"] = "1100" * 25  # seed 1 of `size`: now the seeds differ, and the interval is wider
    assert np.subtract(*data_prep.seed_difference(rows["new"], rows["old"], "final")[:0:-1]) > high - low


@pytest.fixture(scope="session")
def studied(home, taught):
    words = ["mode=study", "profile=smoke", "study.seeds=1", "threads=1", "policy.dtype=float32", f"data={home / 'data'}", f"runs={home / 'study'}",
             f"results={home / 'results'}", f"model={home / 'data' / 'random-model'}", "eval.maps=2", "eval.max_turns=2", "rl.steps=1", "sft.first_steps=1", "sft.steps=1"]
    vrrl.main(words)
    return words, home / "results"


def test_a_study_holds_every_method_and_split_and_how_it_was_made(studied, task):
    words, results = studied
    found = json.loads((results / "study_navigation-smoke.json").read_text())
    methods = list(data_prep.settings_table()[1]["methods"])
    assert [(r["method"], r["split"]) for r in found["rows"]] == [(m, s) for m in methods for s in task.SPLITS]
    needed = {"task", "method", "seed", "split", "ood", "n", "first", "final", "sampled_final", "repair_own", "repair_fixed", "repair_undrawn", "break", "commit", "turns",
              "dev_final", "after_turn"}
    assert all(needed <= set(row) for row in found["rows"]) and found["about"]["settings"]["rl.lr"] is not None
    assert [c["method"] for c in found["about"]["cells"]] == methods and found["about"]["methods"]["rl"]["reward.reflection"] is False
    text = (results / "study_navigation-smoke.md").read_text()
    assert all(f"| {m} |" in text for m in methods) and (results / "study_navigation-smoke.png").stat().st_size > 1000


def test_words_of_a_study_do_not_change_what_tells_the_methods_apart(studied):
    words, results = studied  # with rl.steps=1
    made = json.loads((results / "study_navigation-smoke.json").read_text())["about"]["methods"]
    assert made["sft"]["rl.steps"] == made["sft_long"]["rl.steps"] == 0 and made["vrrl"]["rl.steps"] == 1
    given = {m: vrrl.read_config(data_prep.of_method(["rl.rho=0.3", "sft.times=5", "reward.reflection=no", "seed=4"], m))[0] for m in ("sft", "sft_long", "rl", "vrrl")}
    assert [g.rl.rho for g in given.values()] == [0.3, 0.3, 1.0, 0.3] and [g.sft.times for g in given.values()] == [1.0, 2.0, 5.0, 5.0]
    assert given["vrrl"].reward.reflection and not given["rl"].reward.reflection and given["rl"].seed == 4


def test_a_study_skips_what_is_done_and_says_so_where_settings_differ(studied, monkeypatch):
    words, results = studied
    before = (results / "study_navigation-smoke.json").read_text()
    for function in ("rl", "sft", "evaluate"):
        monkeypatch.setattr(vrrl, function, None)  # calling it would fail
    vrrl.main(words)
    assert (results / "study_navigation-smoke.json").read_text() == before
    with pytest.raises(vrrl.UserError, match="other settings"):
        vrrl.main([*words, "rl.lr=1e-5"])


def test_a_study_of_some_methods_takes_their_cells_and_no_others(studied, monkeypatch, tmp_path):
    words, _ = studied
    monkeypatch.setattr(vrrl, "evaluate", None)
    vrrl.main([*words, "study.methods=sft vrrl", f"results={tmp_path}"])
    assert {r["method"] for r in json.loads((tmp_path / "study_navigation-smoke.json").read_text())["rows"]} == {"sft", "vrrl"}
    assert "| sft |" in (text := (tmp_path / "study_navigation-smoke.md").read_text()) and "| rl |" not in text
    for given, error in (("sft grpo", "grpo"), (" ", "no method")):
        with pytest.raises(vrrl.UserError, match=error):
            vrrl.main([*words, f"study.methods={given}"])


def test_a_study_leaves_a_cell_to_the_process_that_is_at_it_and_comes_back(studied, monkeypatch):
    words, results = studied
    held, slept = data_prep.lock(next((results.parent / "study").glob("*/rtm-seed0"))), []
    monkeypatch.setattr(vrrl.time, "sleep", lambda seconds: (slept.append(seconds), held.close()))
    vrrl.main(words)
    assert len(slept) == 1


def test_tables_of_a_study_come_from_its_file_alone(studied, capsys):
    words, results = studied
    capsys.readouterr()
    data_prep.main(["study", "profile=smoke", f"results={results}"])
    assert capsys.readouterr().out.strip() == (results / "study_navigation-smoke.md").read_text().strip()
    with pytest.raises(vrrl.UserError, match="mode=study task=navigation makes it"):
        data_prep.main(["study", "results=nowhere"])


def test_the_tables_of_studies_in_the_readmes_are_what_the_program_prints():
    results, printed = vrrl.HERE / "results", []
    readme, files = "\n\n".join(file.read_text() for file in (vrrl.HERE / "README.md", results / "README.md")), sorted(results.rglob("study_*.json"))
    assert files
    for file in files:
        task, _, profile = file.stem.removeprefix("study_").partition("-")
        cfg, _ = vrrl.read_config([f"task={task}", f"profile={profile or 'default'}", f"results={file.parent}"])
        text = data_prep.study_text(cfg)
        assert file.with_suffix(".md").read_text().strip() == text, f"python data_prep.py study task={cfg.task} prints other tables"
        printed.append(text.split("\n\n"))
        assert len([table for table in printed[-1] if table.startswith("| ") and table in readme]) >= 2, f"no README has tables of {file.name}"
    shown = [block for block in readme.split("\n\n") if block.startswith(("| method | seeds", "| method | its attempt", "| method | id", "| vrrl minus"))]
    assert all(any(block in tables for tables in printed) for block in shown)


@pytest.mark.parametrize("file", ["README.md", "results/README.md"])
def test_a_readme_says_each_thing_once_and_leaves_nothing_open(file):
    text = (vrrl.HERE / file).read_text()
    headings = re.findall(r"(?m)^##+ .*$", text)
    assert len(headings) > 3 and len(set(headings)) == len(headings)  # a second one would take another anchor
    assert not re.findall(r"@[A-Z_ ]+@|\bTODO\b|TO COME", text)


# ---------------------------------------------------------------- real models
# Small random models of the true classes, with a byte-level BPE tokenizer, Qwen's special tokens and a chat template in its manner: what a
# folder from the hub has, loaded by the same code.

SPECIAL = [f"<|{name}|>" for name in "endoftext im_start im_end object_ref_start object_ref_end vision_start vision_end vision_pad image_pad video_pad".split()]
TALK = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT_ONLY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
LINES = ["<THINK>hole</THINK><ANSWER>up left right down</ANSWER>", "<FINAL>up up left down</FINAL>", "The elf walks over the frozen lake to the gift, around the holes."]
REAL = ["qwen2_5_vl", "qwen3_vl"]


def bpe_tokenizer():
    """A byte-level BPE tokenizer as Qwen's, trained on a few lines; some of its tokens join '>' with what follows."""
    import tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(LINES, trainer)
    bpe.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL, chat_template=TALK)


def real_config(kind, tokenizer):
    """DeepStack for Qwen3-VL, windowed attention (windows of 4x4 patches, one full layer) for Qwen2.5-VL; the vocabulary is padded, as theirs."""
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])))
    text = dict(vocab_size=len(tokenizer) + 19, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=True)
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2])
    if kind == "qwen2_5_vl":
        vision = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=14, window_size=56, fullatt_block_indexes=[1], initializer_range=0.1)
        return transformers.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0}, vision_config=vision, tie_word_embeddings=True, **ids)
    vision = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=16, num_position_embeddings=64,
                  deepstack_visual_indexes=[0, 2, 3], initializer_range=0.1)
    return transformers.Qwen3VLConfig(text_config={**text, "head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}, vision_config=vision, tie_word_embeddings=True, **ids)


CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
PREPROCESSOR = {  # the keys and, but for the pixel limits, the values of the released preprocessor_config.json
    "qwen2_5_vl": dict(min_pixels=56 * 56, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2, **CLIP, image_processor_type="Qwen2VLImageProcessor",
                       processor_class="Qwen2_5_VLProcessor"),
    "qwen3_vl": dict(size=dict(longest_edge=16777216, shortest_edge=64 * 64), patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                     image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor"),
}


def make_real(folder, kind, seed=0):
    """A folder as from the hub. Qwen2.5-VL's way with templates: the tokenizer's is for text alone, the one with images is in chat_template.json."""
    tokenizer = bpe_tokenizer()
    torch.manual_seed(seed)
    config = real_config(kind, tokenizer)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    if kind == "qwen2_5_vl":
        tokenizer.chat_template = TEXT_ONLY
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TALK}))
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR[kind]))
    return folder


@pytest.fixture(scope="session")
def real(home):
    """{kind: folder}"""
    return {kind: make_real(home / kind, kind) for kind in REAL}


def real_settings(home, folder, *words):
    side = "nav.cell=28" if "2_5" in str(folder) else "nav.cell=32"
    return settings(home, f"model={folder}", side, "policy.checkpointing=yes", "policy.max_new=12", "nav.test_maps=4", "nav.dev_maps=4", "eval.maps=2", "sft.steps=3", *words)


@pytest.fixture(scope="session", params=REAL)
def real_policy(request, real, home):
    cfg = real_settings(home, real[request.param])
    return vrrl.load_policy(real[request.param], cfg), vrrl.Navigation(cfg, show=False)


def test_a_real_model_loads_with_its_own_processor_tokenizer_and_template(real_policy):
    policy, _ = real_policy
    kind = policy.model.config.model_type
    assert type(policy.model).__name__ == {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}[kind]
    given, found = PREPROCESSOR[kind], policy.processor
    assert (found.size["shortest_edge"], found.size["longest_edge"]) == ((3136, 12845056) if kind == "qwen2_5_vl" else (4096, 16777216))
    assert all(getattr(found, key) == given[key] for key in ("patch_size", "merge_size", "temporal_patch_size"))
    assert list(found.image_mean) == given["image_mean"] and list(found.image_std) == given["image_std"]
    assert policy.end_id == policy.tokenizer.convert_tokens_to_ids("<|im_end|>") and policy.image_id == policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    special = policy.tokenizer.convert_tokens_to_ids([t for t in SPECIAL if t != "<|im_end|>"])
    assert policy.banned[special].all() and policy.banned[len(policy.tokenizer):].all() and policy.banned.sum() == len(special) + 19
    head = policy.tokenizer.decode(policy.prompt("find", "check")[0])
    assert head == "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nfind<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"


def test_a_folder_without_a_template_for_images_is_one_clear_line(real, home, tmp_path):
    shutil.copytree(real["qwen2_5_vl"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.json").unlink()
    with pytest.raises(vrrl.UserError, match="model=.* cannot be loaded: it has no chat template with images"):
        vrrl.load_policy(tmp_path / "model", real_settings(home, tmp_path / "model"))


def test_tags_are_the_same_ids_wherever_they_stand(real_policy):
    """A byte-level tokenizer joins '>' with what follows; a forced tag must be the learnt one."""
    policy, _ = real_policy
    plain = policy.tokenizer.encode("<ANSWER>up</ANSWER>", add_special_tokens=False)
    assert policy.encode("<ANSWER>up</ANSWER>") == [*policy.encode("<ANSWER>"), *policy.encode("up"), *policy.encode("</ANSWER>")]
    assert policy.decode(policy.encode(LINES[0])) == LINES[0] and len(plain) <= len(policy.encode("<ANSWER>up</ANSWER>"))


def test_a_real_conversation_has_the_ids_of_the_chat_template(real_policy):
    policy, task = real_policy
    for e in demonstrations(policy, task, 3, 3):
        talk = []
        for n, turn in enumerate(e.turns):
            shown = [{"type": "image"}, {"type": "text", "text": "check it"}]
            talk += [{"role": "user", "content": shown if n else [{"type": "text", "text": "find the path"}, shown[0]]}, {"role": "assistant", "content": turn.text}]
        pieces = policy.tokenizer.apply_chat_template(talk, tokenize=False).split("<|image_pad|>")
        sizes = [p.rows * p.cols for p in (*e.opening_pictures, *e.rest_pictures)]
        whole = pieces[0] + "".join("<|image_pad|>" * size + piece for size, piece in zip(sizes, pieces[1:]))
        found = policy.tokenizer.decode([*e.opening, *e.rest])
        assert found == whole.removesuffix("\n")


def test_positions_of_a_real_model_are_the_librarys(real_policy):
    test_positions_are_the_librarys(real_policy[0], None)


@pytest.mark.parametrize("size", [(112, 112), (160, 96), (90, 61), (20, 20), (33, 300)], ids=str)
def test_pictures_reach_a_real_vision_tower_as_from_the_library(real_policy, monkeypatch, size):
    test_pictures_reach_the_vision_tower_as_from_the_library(real_policy[0], monkeypatch, size)


def test_pictures_of_mixed_sizes_keep_their_order_in_a_real_model(real_policy):
    test_pictures_of_mixed_sizes_keep_their_order(real_policy[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_of_a_real_model_equal_those_of_the_librarys_forward(real_policy, temperature):
    policy, task = real_policy
    policy = with_settings(policy, temperature=temperature)
    episodes = demonstrations(policy, task, 3, 3)
    assert furthest([l.detach() for l in policy.log_probs(episodes)[0]], [library_log_probs(policy, e) for e in episodes]) < 2e-4


def test_recorded_log_probs_of_a_real_model_equal_recomputed_ones(real_policy, monkeypatch):
    policy, task = real_policy
    episodes = sampled(policy, task, monkeypatch, count=2)  # max_new=12 ends most turns before their end token; talkative makes them attempts all the same
    assert any(e.replayed for e in episodes)
    assert furthest([l.detach() for l in policy.log_probs(episodes)[0]], [recorded(e) for e in episodes]) < 2e-4


def test_log_probs_with_the_librarys_attention_as_on_a_gpu_are_the_same(real_policy, monkeypatch):
    """On a CPU the heads that share a key go together; a GPU takes the library's kernel, with the same masks and cache."""
    policy, task = real_policy
    episodes = sampled(policy, task, monkeypatch, count=2)
    ours = [l.detach() for l in policy.log_probs(episodes)[0]]
    monkeypatch.setattr(policy.model.config.text_config, "_attn_implementation", "sdpa")
    assert furthest([l.detach() for l in policy.log_probs(episodes)[0]], ours) < 1e-4
    again = vrrl.play(policy, task, [dataclasses.replace(e, turns=[]) for e in episodes[:4]], 1, 3, None, greedy=True)
    assert furthest([l.detach() for l in policy.log_probs(again)[0]], [recorded(e) for e in again]) < 2e-4


def gradients_of(policy, episodes):
    policy.model.zero_grad()
    logps, entropies = policy.log_probs(episodes)
    sum((n + 1) * l.sum() for n, l in enumerate(logps)).backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return [l.detach() for l in logps], list(entropies), found


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_changes_neither_log_probs_nor_gradients(real, real_policy, home, monkeypatch, frozen):
    again, task = real_policy
    plain = vrrl.load_policy(real[again.model.config.model_type], real_settings(home, real[again.model.config.model_type], "policy.checkpointing=no"))
    monkeypatch.setattr(data_prep.in_parts, "__defaults__", (7,))  # several parts
    episodes = sampled(plain, task, monkeypatch, count=2)  # groups share their opening, prefixes differ in length
    for policy in (plain, again):
        policy.freeze_vision(frozen)
    for e in episodes:
        for p in (*e.opening_pictures, *e.rest_pictures):
            p.features = None
    (a, entropies_a, da), (b, entropies_b, db) = gradients_of(plain, episodes), gradients_of(again, episodes)
    again.freeze_vision(False)
    assert furthest(a, b) < 1e-5 and furthest(entropies_a, entropies_b) < 1e-4 and da.keys() == db.keys() and any("visual" in name for name in da) != frozen
    assert furthest(da.values(), db.values()) < 1e-4 * max(g.abs().max() for g in da.values())


def kept_bytes(policy, episodes):
    """Bytes that autograd keeps for the backward pass, weights apart; each storage counted once."""
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.log_probs(episodes)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_gradient_checkpointing_keeps_a_fraction_of_the_activations(real, real_policy, home):
    again, task = real_policy
    plain = vrrl.load_policy(real[again.model.config.model_type], real_settings(home, real[again.model.config.model_type], "policy.checkpointing=no"))
    episodes = demonstrations(again, task, 4, 4)
    assert kept_bytes(again, episodes) < 0.35 * kept_bytes(plain, episodes)


# What the library's own processor (AutoProcessor, which needs torchvision) makes of a conversation of three turns about two pictures.
# Made with torchvision 0.28.0 by `python test_vrrl.py processor`, which prints this table; kept here, since the tests run without torchvision.
PROCESSOR = {
    "qwen2_5_vl": {"ids": [172, "fd5f830a60db0754"], "grid": [[1, 12, 12], [1, 8, 16]], "positions": [117, "f714bfb02b0c2b00"], "pixels": [423891.8, 241.2, 1.68, 0.65]},
    "qwen3_vl": {"ids": [172, "fd5f830a60db0754"], "grid": [[1, 12, 12], [1, 8, 16]], "positions": [117, "f714bfb02b0c2b00"], "pixels": [254740.58, 81.53, 0.87, 0.18]},
}


def conversation(kind):
    """(messages, pictures): texts and images of three turns; sizes that need no resizing, since the two image processors round differently there."""
    side = 28 if kind == "qwen2_5_vl" else 32
    first = data_prep.draw_grid(LAKE, "snow", 2 * side)
    second = data_prep.draw_path(data_prep.draw_grid(["SFFF", "FHFG"], "desert", 2 * side), (2, 4), (0, 0), ["right", "down", "up"], "desert")
    text, image = (lambda t: {"type": "text", "text": t}), {"type": "image"}
    said = [answer("right down"), revise(EXACT)]
    return [{"role": "user", "content": [text("find the path"), image]}, {"role": "assistant", "content": [text(said[0])]},
            {"role": "user", "content": [image, text("check it")]}, {"role": "assistant", "content": [text(said[1])]}], [first, second], said


def fingerprint(ids, pixels, grid, positions):
    """Lengths, a checksum of ids and positions, and a few numbers of the patches: what tells two of them apart."""
    pixels = np.asarray(pixels, dtype=np.float64)
    ramp = np.cos(np.arange(pixels.size) % 1009).reshape(pixels.shape)
    return {"ids": [len(ids), data_prep.checksum(json.dumps(list(map(int, ids))).encode())], "grid": np.asarray(grid).tolist(),
            "positions": [int(np.max(positions)), data_prep.checksum(json.dumps(np.asarray(positions).tolist()).encode())],
            "pixels": [round(float(x), 2) for x in (pixels.sum(), (pixels * ramp).sum(), pixels[7, 11], pixels[-1, -1])]}


def print_processor(words):
    """`python test_vrrl.py processor`: the table PROCESSOR, by the library's own processor; needs torchvision."""
    import tempfile
    for kind in REAL:
        with tempfile.TemporaryDirectory() as folder:
            make_real(Path(folder), kind)
            processor = transformers.AutoProcessor.from_pretrained(folder)
            model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
        talk, pictures, _ = conversation(kind)
        text = processor.apply_chat_template(talk, tokenize=False)
        made = processor(text=[text], images=pictures, return_tensors="pt")
        kinds = made["input_ids"].eq(model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(made["input_ids"], kinds, image_grid_thw=made["image_grid_thw"])
        print(f"    {kind!r}: {fingerprint(made['input_ids'][0], made['pixel_values'], made['image_grid_thw'], positions[:, 0].numpy())},")


def test_ids_patches_and_positions_equal_those_of_the_librarys_processor(real_policy, monkeypatch):
    policy, _ = real_policy
    kind = policy.model.config.model_type
    _, images, said = conversation(kind)
    head, between = policy.prompt("find the path", "check it")
    pictures, seen = [policy.picture(i) for i in images], []
    real = policy.model.model.get_image_features
    monkeypatch.setattr(policy.model.model, "get_image_features", lambda x, grid, **kw: seen.append((x, grid)) or real(x, grid, **kw))
    with torch.no_grad():
        for picture in pictures:
            policy.encode_pictures([picture])
    patches, grids = zip(*seen)
    # The processor ends its text with a line break after the last turn; ours ends with the token that closes it.
    turn = lambda text: policy.tokenizer.encode(text, add_special_tokens=False)
    ids = [*policy.place(head, pictures[0]), *turn(said[0]), policy.end_id, *policy.place(between, pictures[1]), *turn(said[1]), policy.end_id, *turn("\n")]
    positions, _ = policy.positions(ids, iter([(p.rows, p.cols) for p in pictures]))
    found, expected = fingerprint(ids, torch.cat(patches), torch.cat(grids), positions), dict(PROCESSOR[kind])
    assert found.pop("pixels") == pytest.approx(expected.pop("pixels"), abs=0.1) and found == expected


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("words", [["policy.optimizer=kahan", "rl.kl=0.01", "sft.freeze_vision=no", "rl.freeze_vision=no"],
                                   ["policy.dtype=bfloat16", "policy.optimizer=kahan", "policy.keep_pictures=no", "rl.measure_kl=no"]], ids=["free vision, KL", "frozen, bf16"])
def test_a_real_model_goes_through_the_whole_command(real, home, tmp_path, monkeypatch, capsys, kind, words):
    """SFT, RL, save, reload and evaluate, with rewards that give every group a signal: a model this small ends few turns."""
    words = ["profile=smoke", f"model={real[kind]}", "nav.cell=28" if kind == "qwen2_5_vl" else "nav.cell=32", f"data={home / 'data'}", f"runs={tmp_path}", "nav.test_maps=4",
             "nav.dev_maps=4", "eval.maps=2", "sft.first_steps=0", "sft.steps=2", "rl.steps=2", "rl.questions=2", "rl.at_once=4", "policy.checkpointing=yes", "policy.max_new=12", "threads=1",
             "device=cpu", *words]
    monkeypatch.setattr(vrrl, "reward", lambda task, e, cfg: sum(e.rest) % 7 / 10 + 0.1)
    vrrl.main(words)
    folder = tmp_path / "navigation-vrrl-seed0-smoke"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in lines] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]
    assert all(math.isfinite(m["grad_norm"]) and m["grad_norm"] > 0 and m["skipped"] == 0 for m in lines)
    assert all((m["kl"] is None) == ("rl.measure_kl=no" in words) for m in lines if m["stage"] == "rl")
    assert "| vrrl | both (ood) |" in capsys.readouterr().out
    trained, start, given = (dict(transformers.AutoModelForImageTextToText.from_pretrained(f, dtype=torch.float32).named_parameters())
                             for f in (folder / "model", next(tmp_path.glob("sft-*/model")), real[kind]))
    moved = lambda a, b, part: any(not torch.equal(a[k], b[k]) for k in a if part in k)
    assert moved(start, given, "language") and moved(trained, start, "language")
    assert moved(trained, start, "visual") == ("rl.freeze_vision=no" in words)
    vrrl.main(["mode=eval", *words, f"model={folder / 'model'}"])
    figures = lambda rows: [[row[k] for k in ("split", "n", "first", "final", "commit", "turns", "final_by_map")] for row in rows]
    again, before = (json.loads((f / "results.json").read_text())["rows"] for f in (tmp_path / f"eval-{folder.name}-model", folder))
    assert figures(again) == figures([row for row in before if row["method"] == "vrrl"])


def test_a_model_whose_files_lack_tensors_is_refused(cfg, policy, tmp_path):
    import safetensors.torch
    vrrl.save_policy(policy, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    kept = {k: v for k, v in safetensors.torch.load_file(file).items() if "layers.1." not in k}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(vrrl.UserError, match="cannot be loaded: its files lack 11 of the model's tensors"):
        vrrl.load_policy(tmp_path / "model", cfg)


@pytest.mark.parametrize("content, reason", [
    ({"system": None, "question": "a", "feedback": "b"}, "system is not a text"),
    ({"question": "a", "feedback": "b", "max_turns_eval": True}, "max_turns_eval is not a whole number"),
    ({"question": "a", "feedback": "b", "max_turns_eval": 10.7}, "max_turns_eval is not a whole number"),
])
def test_a_protocol_of_wrong_types_is_one_clear_line(tmp_path, content, reason):
    (tmp_path / "protocol.json").write_text(json.dumps(content))
    with pytest.raises(vrrl.UserError, match=reason):
        data_prep.read_protocol(tmp_path / "protocol.json")


def test_the_authors_files_may_be_named_in_any_way_but_not_twice(tmp_path, monkeypatch):
    entry = {"map_id": "m0", "layout": ["SF", "FG"], "start_pos": 0, "target_pos": 3}
    tests = [{"id": "t0", "input_map": "none.png", "metadata": {"level": 2, "layout": ["SF", "FG"], "start_pos": 0, "target_pos": 3}}]
    (tmp_path / "maps.json").write_text(json.dumps([entry]))
    (tmp_path / "eval.json").write_text(json.dumps(tests))
    monkeypatch.chdir(tmp_path)
    cfg, _ = vrrl.read_config(["nav.sft_traces=16"])
    folder = data_prep.make_official("data", cfg, "./maps.json", "./eval.json")
    assert data_prep.read_splits(folder) == ("id",) and folder != data_prep.make_official("data", vrrl.read_config(["nav.sft_traces=16", "nav.seed=5"])[0], "maps.json", "eval.json")
    with pytest.raises(vrrl.UserError, match="used twice"):
        data_prep.make_official("data", cfg, "", "eval.json,eval.json")
    with pytest.raises(vrrl.UserError, match="has no test maps"):
        data_prep.read_splits(data_prep.make_official("data", cfg, "maps.json"))


def quadratic(make, lr, steps, dtype):
    """Weights after steps of an optimizer on a noisy quadratic; `make(module)` gives its step."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(64, 64, bias=False).to(dtype)
    start, goal = torch.randn(64, 64, generator=generator).bfloat16().float() * 0.1, torch.randn(64, 64, generator=generator) * 0.1
    module.weight.data.copy_(start)
    step = make(module)
    for _ in range(steps):
        (0.5 * (module.weight.float() - goal + 0.3 * torch.randn(64, 64, generator=generator)) ** 2).sum().backward()
        step()
    return module.weight.detach().float() - module.weight.detach().new_tensor(start.numpy()).float()


def test_updates_too_small_for_bf16_add_up_with_copies_and_with_compensation_and_not_without():
    """At the paper's rate of 5e-7 plain bf16 AdamW leaves the weights where they were."""
    def plain(module):
        adam = torch.optim.AdamW(module.parameters(), lr=5e-7, betas=(0.9, 0.95), weight_decay=0.0)
        return lambda: (adam.step(), adam.zero_grad())

    def shadow(kind):
        """What the optimizer itself knows of the movement: the copies, or the weights and what rounding has taken from them."""
        kept = {}
        def make(module):
            kept["o"] = o = kind(SimpleNamespace(model=module))
            return lambda: o.step(5e-7, 1e9)
        moved = quadratic(make, 5e-7, 400, torch.bfloat16)
        o = kept["o"]
        return moved, (o.copies[0] if kind is data_prep.Optimizer else o.weights[0].float() + o.rest[0].float()).detach() - (o.weights[0].detach().float() - moved)

    exact = quadratic(plain, 5e-7, 400, torch.float32)
    stuck = quadratic(plain, 5e-7, 400, torch.bfloat16)
    assert (stuck != 0).float().mean() < 0.05 and exact.abs().mean() > 2e-5
    for kind in (data_prep.Optimizer, data_prep.KahanOptimizer):
        moved, inside = shadow(kind)
        assert (moved != 0).float().mean() > 5 * (stuck != 0).float().mean()
        assert torch.corrcoef(torch.stack([inside.flatten(), exact.flatten()]))[0, 1] > 0.99
        assert (inside - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_compensated_bf16_follows_fp32_over_many_larger_steps():
    ours = lambda kind: lambda module: (lambda o: lambda: o.step(1e-4, 1.0))(kind(SimpleNamespace(model=module)))
    exact, kahan = quadratic(ours(data_prep.Optimizer), 1e-4, 300, torch.float32), quadratic(ours(data_prep.KahanOptimizer), 1e-4, 300, torch.bfloat16)
    assert (kahan - exact).norm() < 0.03 * exact.norm()
    same = quadratic(ours(data_prep.KahanOptimizer), 1e-4, 300, torch.float32)  # in fp32 it is AdamW
    assert (same - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("kind", [data_prep.Optimizer, data_prep.KahanOptimizer])
def test_an_optimizer_goes_on_from_its_state(kind):
    def run(stop):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)).to(torch.bfloat16)
        module[1].bias.requires_grad_(False)
        optimizer = kind(SimpleNamespace(model=module))
        for step in range(6):
            if step == stop:
                saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
                for p in module.parameters():
                    if p.requires_grad:
                        p.data.normal_()
                optimizer = kind(SimpleNamespace(model=module))
                optimizer.restore(saved)
            (module(torch.full((3, 8), step / 5).bfloat16()).float() ** 2).sum().backward()
            optimizer.step(1e-3, 1.0)
        return [p.detach().clone() for p in module.parameters()]
    assert furthest(run(None), run(3)) == 0


def test_memory_is_estimated_before_and_what_to_lower_is_said(real, home, monkeypatch, tmp_path):
    words = ["profile=smoke", f"model={real['qwen3_vl']}", f"data={home / 'data'}", f"runs={tmp_path}", "nav.cell=32", "nav.test_maps=4", "nav.dev_maps=4"]
    monkeypatch.setattr(data_prep, "memory_of", lambda device: 1e6)
    for mode in ("train", "eval"):
        with pytest.raises(vrrl.UserError) as error:
            vrrl.main(["threads=1", *words, f"mode={mode}"])
        line = str(error.value)
        assert "needs about" in line and "has 0.0 GB" in line and "\n" not in line
        assert all(key in line for key in ("rl.micro", "policy.max_new", "policy.optimizer=kahan", "rl.freeze_vision", "rl.kl=0"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_says_what_to_lower(capsys, error):
    def full(words):
        raise error
    assert "out of memory: lower rl.micro" in fails(capsys, [], full)


def test_every_mend_for_memory_is_a_setting():
    spec = data_prep.settings_table()[0]
    names = [word.split("=")[0] for word in re.findall(r"[a-z]+\.[a-z_]+", data_prep.MENDS)]
    assert len(names) > 8 and all(name in spec for name in names)


ARCHITECTURES = {  # of the released models, for counting and for timing with random weights
    "qwen2.5-vl-3b": dict(
        text_config=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, rms_norm_eps=1e-6,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])),
    "qwen3-vl-2b": dict(
        text_config=dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=262144,
                         rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)),
        vision_config=dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2048, patch_size=16, deepstack_visual_indexes=[5, 11, 17])),
    "qwen3-vl-4b": dict(
        text_config=dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=262144,
                         rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)),
        vision_config=dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560, patch_size=16, deepstack_visual_indexes=[5, 11, 17])),
}


def architecture(profile, tokenizer):
    """The config of a profile's model, with the ids of our small tokenizer: its vocabulary is a part of theirs."""
    given = ARCHITECTURES[profile]
    ids = real_config("qwen3_vl", tokenizer)
    kind = transformers.Qwen2_5_VLConfig if "window_size" in given["vision_config"] else transformers.Qwen3VLConfig
    return kind(text_config={"vocab_size": 151936, "tie_word_embeddings": True, **given["text_config"]}, vision_config=given["vision_config"], tie_word_embeddings=True,
                image_token_id=ids.image_token_id, video_token_id=ids.video_token_id, vision_start_token_id=ids.vision_start_token_id, vision_end_token_id=ids.vision_end_token_id)


@pytest.mark.parametrize("profile, billions, gigabytes", [("qwen2.5-vl-3b", 3.75, 85), ("qwen3-vl-2b", 2.13, 25.2), ("qwen3-vl-4b", 4.44, 85)])
def test_a_profile_fits_the_gpu_it_is_made_for(monkeypatch, profile, billions, gigabytes):
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(architecture(profile, bpe_tokenizer()), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    monkeypatch.setattr(data_prep, "memory_of", lambda device: gigabytes * 1e9)
    cfg, gpu = vrrl.read_config([f"profile={profile}"])[0], SimpleNamespace(type="cuda")
    needed = lambda cfg: data_prep.memory_sum(data_prep.memory_needed(model, cfg, gpu, picture=196))
    assert 0.6 * gigabytes < needed(cfg) / 1e9 < gigabytes
    parts = data_prep.memory_needed(model, cfg, gpu, picture=196)
    row = re.search(rf"(?m)^\| {re.escape(profile)} \| [\d.]+e9.*$", (vrrl.HERE / "README.md").read_text())[0]
    assert [float(cell) for cell in row.split("|")[3:-1]] == [round(b / 1e9, 1) for b in (*parts.values(), data_prep.memory_sum(parts))]
    for word in ("rl.micro=64", "rl.at_once=256", "policy.optimizer=master", "policy.checkpointing=no"):  # each mend moves the estimate
        assert needed(vrrl.read_config([f"profile={profile}", word])[0]) > needed(cfg)


def test_the_estimate_of_activations_is_near_what_is_kept(real_policy, real, home):
    """Above it, since traces are as long as they may be only in the estimate. Without checkpointing, where it can be counted; the language model only."""
    policy, task = real_policy
    kind = policy.model.config.model_type
    cfg = real_settings(home, real[kind], "policy.checkpointing=no", "rl.steps=0", "sft.micro=4", "policy.keep_pictures=no")
    plain = vrrl.load_policy(real[kind], cfg)
    plain.freeze_vision(True)
    episodes = demonstrations(plain, task, 4, 4)
    assert len(episodes) == 4
    picture = max(p.rows * p.cols for e in episodes for p in e.opening_pictures)
    estimate = data_prep.memory_needed(plain.model, cfg, torch.device("cpu"), picture)["activations"]
    assert 1 < estimate / kept_bytes(plain, episodes) < 4


OFFICIAL = vrrl.HERE.parent / "shared" / "data" / "official_frozenlake"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the authors' data does not lie beside this project")


def official_settings(home, folder, *words):
    return settings(home, f"nav.folder={folder}", "eval.maps=1000", *words)


@official
@pytest.mark.parametrize("words", [["--maps", "MAPS", "--eval", "EVAL"], ["maps=MAPS", "eval=EVAL"]], ids=["--maps FILE", "maps=FILE"])
def test_the_authors_data_becomes_a_data_folder(home, capsys, words):
    words = [w.replace("MAPS", str(OFFICIAL / "rl_train_maps.json")).replace("EVAL", str(OFFICIAL / "eval_data.json")) for w in words]
    data_prep.main(["official", *words, f"data={home / 'authors'}", "nav.sft_traces=24", "threads=1"])
    folder = capsys.readouterr().out.strip().splitlines()[-1].split("nav.folder=")[1]
    task = vrrl.Navigation(official_settings(home, folder))
    assert task.SPLITS == ("id", "size") and [len(task.load(s)) for s in ("train", "sft", "test_id", "test_size")] == [3000, 24, 750, 250]
    assert Counter(len(e["layout"]) for e in task.load("train")) == {4: 1000, 5: 2000} and Counter(len(e["layout"]) for e in task.load("test_id")[:250]) == {3: 84, 4: 83, 5: 83}
    given = {f"{e['metadata']['level']}x{e['metadata']['level']}-{e['id']}": e["metadata"] for e in json.loads((OFFICIAL / "eval_data.json").read_text())}
    for e in (e for split in ("test_id", "test_size") for e in task.load(split)):
        assert e["layout"] == ["".join(row) for row in given[e["id"]]["layout"]]
        assert task.exact(e, tuple(given[e["id"]]["actions"]))  # their own shortest path
    theirs = [e for split in ("test_id", "test_size") for e in task.load(split) if "drawn" not in e]
    assert [e["id"] for e in theirs] == ["3x3-example_0000", "4x4-example_0250", "5x5-example_0500", "6x6-example_0750"]
    for e in theirs:
        image = task.image(e)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(OFFICIAL / f"{e['id'][4:]}_input.png").convert("RGB")))
    assert all(task.image(e).size == (16 * len(e["layout"]),) * 2 for e in task.load("train")[:20])


@official
def test_paths_lie_on_the_cells_of_the_authors_pictures(home, tmp_path):
    """Their grids have margins: ice, holes and gift are where the box says, and a path runs through the middle of its cells."""
    folder = data_prep.make_official(tmp_path, settings(home), evals=str(OFFICIAL / "eval_data.json"))
    task = vrrl.Navigation(official_settings(home, folder))
    for e in (e for split in ("test_id", "test_size") for e in task.load(split) if "drawn" not in e):
        image, (left, top, right, bottom), n = np.asarray(task.image(e)).astype(int), e["box"], len(e["layout"])
        side = (right - left) / n
        at = lambda r, c: (round(top + (r + 0.5) * side), round(left + (c + 0.5) * side))
        middle = lambda r, c: image[at(r, c)[0] - 20:at(r, c)[0] + 20, at(r, c)[1] - 20:at(r, c)[1] + 20].mean((0, 1))
        blue = ["".join("H" if middle(r, c)[0] < 140 and middle(r, c)[2] > 220 else "." for c in range(n)) for r in range(n)]  # holes are blue in the middle, ice is white
        assert blue == [re.sub("[^H]", ".", row) for row in e["layout"]]
        path = data_prep.sample_shortest_path(e["layout"], random.Random(0))
        drawn = np.asarray(task.feedback(e, tuple(path)))
        assert all(tuple(drawn[at(*cell)]) == (225, 6, 0) for cell in places(e["layout"], path)[0]) and not np.array_equal(drawn, image)
        outside = np.ones(image.shape[:2], bool)
        outside[top:bottom, left:right] = False
        assert np.array_equal(drawn[outside], image[outside])


@official
def test_the_authors_data_can_be_trained_and_evaluated_on_and_drawn_pictures_are_said(home, tmp_path, taught, capsys):
    vrrl.save_policy(taught, tmp_path / "model")
    folder = data_prep.make_official(tmp_path, settings(home, "nav.sft_traces=16"), str(OFFICIAL / "rl_train_maps.json"), str(OFFICIAL / "eval_data.json"))
    words = ["profile=smoke", "threads=1", f"model={tmp_path / 'model'}", f"nav.folder={folder}", f"runs={tmp_path / 'runs'}", "eval.maps=3", "sft.first_steps=0", "sft.steps=1", "rl.steps=1"]
    vrrl.main(words)
    vrrl.main([*words, "mode=eval"])
    report = (tmp_path / "runs" / "navigation-vrrl-seed0-smoke" / "report.md").read_text()
    for text in (report, capsys.readouterr().out):
        assert "| id |" in text and "| size (ood) |" in text and "Not comparable with the authors' figures" in text and "2 of 3 in size" in text


@official
def test_a_checkpoint_is_evaluated_in_the_authors_words(home, tmp_path, real, capsys):
    words = ["profile=smoke", "mode=eval", f"model={real['qwen3_vl']}", f"data={home / 'data'}", f"runs={tmp_path}", f"protocol={OFFICIAL / 'official_protocol.json'}", "nav.cell=32",
             "nav.test_maps=4", "nav.dev_maps=4", "eval.maps=1", "policy.max_new=8", "threads=1"]
    cfg, given = vrrl.read_config(words)[0], json.loads((OFFICIAL / "official_protocol.json").read_text())
    assert (cfg.protocol.system, cfg.protocol.question, cfg.protocol.feedback) == (given["system"], given["first_user"], given["feedback_user"]) and cfg.eval.max_turns == 10
    policy = vrrl.load_policy(real["qwen3_vl"], cfg)
    head, between = (policy.tokenizer.decode(ids) for ids in policy.prompt(given["first_user"], given["feedback_user"]))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert head == f"<|im_start|>system\n{given['system']}<|im_end|>\n<|im_start|>user\n{given['first_user']}{picture}<|im_end|>\n<|im_start|>assistant\n"
    assert between == f"\n<|im_start|>user\n{picture}{given['feedback_user']}<|im_end|>\n<|im_start|>assistant\n"
    vrrl.main(words)
    assert "| id |" in capsys.readouterr().out


OWN_WORDS = {"system": "s", "question": "q", "feedback": "f"}


def test_a_protocol_file_sets_the_words_and_the_command_line_goes_before_it(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({**OWN_WORDS, "max_turns_eval": 7, "order": "question text, image; feedback image, then text", "remark": 1}))
    cfg = vrrl.read_config([f"protocol={tmp_path / 'p.json'}", "protocol.question=mine"])[0]
    assert (cfg.protocol.system, cfg.protocol.question, cfg.protocol.feedback, cfg.eval.max_turns) == ("s", "mine", "f", 7)
    assert vrrl.read_config(["profile=qwen3-vl-4b", f"protocol.file={tmp_path / 'p.json'}"])[0].protocol.question == "q"  # before the profile


@pytest.mark.parametrize("content, said", [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "needs a text question or first_user"), ('{"question": "q"}', "needs a text feedback"),
                                           ('{"question": 3, "feedback": "f"}', "needs a text question"), (json.dumps({**OWN_WORDS, "max_turns_eval": 0}), "eval.max_turns=0"),
                                           (json.dumps({**OWN_WORDS, "order": "image, then text; feedback text"}), "order of texts and images")])
def test_a_wrong_protocol_file_is_one_clear_line(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    assert said in fails(capsys, [f"protocol={tmp_path / 'p.json'}"])


EVAL = {"id": "a", "input_map": "a.png", "metadata": {"level": 2, "layout": [["S", "F"], ["H", "G"]], "start_pos": 0, "target_pos": 3}}
MAP = {"map_id": "m", "layout": [["S", "F"], ["H", "G"]], "start_pos": 0, "target_pos": 3}


@pytest.mark.parametrize("key, entry, said", [
    ("eval", {**EVAL, "input_map": "../a.png"}, "leaves the folder"), ("eval", {**EVAL, "id": "../a"}, "no plain name"), ("eval", {"id": "a"}, "entry 1 is not one"),
    ("eval", {**EVAL, "metadata": {**EVAL["metadata"], "start_pos": 1}}, "not where the layout"), ("maps", {**MAP, "layout": [["S", "H"], ["H", "G"]]}, "no way from S"),
    ("maps", {**MAP, "layout": 5}, "entry 1 is not one"), ("maps", EVAL, "entry 1 is not one"), ("maps", {**MAP, "map_id": "a/b"}, "no plain name"), ("maps", 5, "entry 1 is not one"),
    ("maps", None, "is not one"), ("eval", {**EVAL, "input_map": 5}, "is not one"), ("maps", {**MAP, "map_id": 7}, "no plain name"),
])
def test_a_wrong_file_of_the_authors_is_one_clear_line(tmp_path, capsys, key, entry, said):
    (tmp_path / "x.json").write_text(json.dumps([entry]))
    line = fails(capsys, [f"data={tmp_path / 'data'}", f"{key}={tmp_path / 'x.json'}"], lambda words: data_prep.main(["official", *words]))
    assert said in line and "x.json" in line and not (tmp_path / "data").exists()


def test_a_picture_that_comes_later_makes_another_folder_and_a_broken_one_is_named(home, tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps([EVAL]))
    make = lambda: data_prep.make_official(tmp_path / "data", settings(home), evals=str(tmp_path / "x.json"))
    first = make()
    assert json.loads((first / "data.json").read_text())["drawn_here"] == {"test_id": 1} and make() == first
    (tmp_path / "a.png").write_text("no picture")
    assert "a.png: not a usable image" in fails(capsys, [], lambda words: make())
    image = Image.new("RGB", (48, 44), "white")
    image.paste((9, 9, 9), (4, 2, 44, 42))
    image.save(tmp_path / "a.png")
    second = make()
    record = json.loads((second / "test_id.jsonl").read_text())
    assert second != first and record["box"] == [4, 2, 44, 42] and "drawn" not in record and vrrl.Navigation(official_settings(home, second)).SPLITS == ("id",)


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_data_folder_that_is_none_is_one_clear_line(capsys, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    assert "official` has made" in fails(capsys, [f"nav.folder={folder}", f"runs={tmp_path / 'runs'}"])


CASES = [  # the start is at the top left, the hole in the middle, the gift at the bottom right, four moves away: (attempt, outcome, exact, progress)
    ("exact", "right right down down", True, 1), ("the other way", "down down right right", True, 1), ("commas", "right, right, down, down", True, 1),
    ("longer", "right left right right down down", False, 0.25), ("overshoot", "right right down down up", False, 0), ("overshoot, back again", "right right down down up down", False, 0),
    ("overshoot off the grid", "right right down down down", False, 0), ("off the grid at once", "up right right down down", False, 0), ("off the grid later", "right right right down down", False, 0.5),
    ("hole", "right down down right", False, 0.25), ("short", "right right down", False, 0.75), ("one move", "down", False, 0.25), ("away", "right left", False, 0.25),
]


@pytest.mark.parametrize("text, exact, progress", [row[1:] for row in CASES], ids=[row[0] for row in CASES])
def test_exactness_progress_and_reward_are_what_the_method_says(task, cfg, text, exact, progress):
    example, attempt = {"layout": LAKE}, task.parse(text)
    assert (task.exact(example, attempt), task.progress(example, attempt)) == (exact, progress)
    assert reward(task, cfg, answer(text), final(text)) == pytest.approx(1.0 if exact else 0.1)  # committed at once
    assert reward(task, cfg, answer("up"), revise(text), final(text)) == pytest.approx(1 + 0.1 * progress - 0.01 if exact else 0.1 + 0.9 * progress)  # after an attempt of progress 0
    assert reward(task, cfg, answer("left"), revise(text)) == reward(task, cfg, answer(text)) == 0  # uncommitted: malformed in the paper
    assert reward(task, cfg, answer(text), revise(text), final(text)) == reward(task, cfg, answer(text), answer("left"), final("left")) == 0  # repeated; a revision without THINK


# ---------------------------------------------------------------- the command line


def command(*words):
    return [sys.executable, str(vrrl.HERE / "vrrl.py"), *map(str, words)]


@pytest.fixture(scope="session")
def smoke(home, taught, task):
    """The smoke run, twice at the same time into different folders (one thread each, SFT and all)."""
    vrrl.save_policy(taught, home / "model")
    words = ["profile=smoke", f"model={home / 'model'}", f"data={home / 'data'}", "device=cpu", "threads=1", "buffer.start=1"]
    runs = [subprocess.Popen(command(*words, f"runs={home / name}"), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name in ("runs", "again")]
    outputs = [run.communicate(timeout=150) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    return words, home / "runs" / "navigation-vrrl-seed0-smoke", home / "again" / "navigation-vrrl-seed0-smoke", outputs[0]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_its_settings_figures_pictures_and_model(smoke):
    _, folder, _, (out, _) = smoke
    names = {"settings.yaml", "metrics.jsonl", "results.json", "report.md", "curves.png", "episodes.png", "timing.jsonl", "run.json", "model"}
    assert names <= {p.name for p in folder.iterdir()} and not list(folder.rglob("*.tmp"))
    assert all(Image.open(folder / name).size > (100, 100) for name in ("curves.png", "episodes.png"))
    for name in ("timing.jsonl", "metrics.jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in (folder / name).read_text().splitlines())
    assert "| vrrl | id |" in out and "torch" in json.loads((folder / "run.json").read_text())


def test_metrics_hold_every_step_and_results_every_split_of_both_models(smoke):
    lines = [json.loads(line) for line in (smoke[1] / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in lines] == [("first", n) for n in range(1, 9)] + [("sft", n) for n in range(1, 5)] + [("rl", n) for n in range(1, 4)]
    rows = json.loads((smoke[1] / "results.json").read_text())["rows"]
    assert [(r["method"], r["split"]) for r in rows] == [(m, s) for m in ("sft", "vrrl") for s in vrrl.Navigation.SPLITS]


def test_the_same_seed_gives_the_same_bytes(smoke):
    for name in ("metrics.jsonl", "results.json", "settings.yaml", "model/model.safetensors"):
        assert (smoke[1] / name).read_bytes() == (smoke[2] / name).read_bytes(), name


def test_the_trained_model_is_an_ordinary_hugging_face_folder(smoke, home):
    folder, sft = smoke[1] / "model", next(smoke[1].parent.glob("sft-*/model"))
    trained, start = (transformers.AutoModelForImageTextToText.from_pretrained(f) for f in (folder, sft))
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("<THINK>") == transformers.AutoTokenizer.from_pretrained(home / "model").encode("<THINK>")
    visual = lambda model: [v for k, v in model.state_dict().items() if "visual" in k]
    assert furthest(visual(trained), visual(start)) == 0  # RL leaves the frozen tower alone


def test_the_settings_of_a_run_make_it_again(smoke):
    import yaml
    kept = yaml.safe_load((smoke[1] / "settings.yaml").read_text())
    show = lambda v: {True: "yes", False: "no"}[v] if isinstance(v, bool) else v
    flat = vrrl.read_config([f"{k}={show(v)}" for k, v in kept.items()])[1]
    assert {k: flat[k] for k in kept} == kept


def test_the_same_command_again_prints_the_table_and_trains_nothing(smoke):
    words, folder, _, _ = smoke
    before = contents(folder)
    run = subprocess.run(command(*words, f"runs={folder.parent}"), cwd=folder.parent.parent, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "| vrrl | id |" in run.stdout and contents(folder) == before


def test_a_run_with_other_settings_overwrites_nothing(smoke, capsys):
    words, folder, _, _ = smoke
    before = contents(folder.parent)
    line = fails(capsys, [*words, f"runs={folder.parent}", "rl.lr=0.01"])
    assert f"rl.lr was {vrrl.read_config()[0].rl.lr}, now 0.01" in line and str(folder) in line and contents(folder.parent) == before


@pytest.mark.parametrize("name", ["table", "chart", "points"])
def test_pointing_goes_through_every_stage(home, taught, own, tmp_path, name):
    own()
    vrrl.save_policy(taught, tmp_path / "model")
    data = tmp_path / ("my.jsonl" if name == "points" else "data")
    words = ["profile=smoke", f"task={name}", f"model={tmp_path / 'model'}", f"data={data}", f"runs={tmp_path / 'runs'}", "threads=1", "device=cpu"]
    run = subprocess.run(command(*words), capture_output=True, text=True, timeout=100)
    folder = tmp_path / "runs" / f"{name}-vrrl-seed0-smoke"
    assert run.returncode == 0 and "| vrrl | id |" in run.stdout and (folder / "episodes.png").is_file(), run.stderr
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [r["split"] for r in rows] == 2 * list(vrrl.TASKS[name].SPLITS) and ("mean ood" in run.stdout) == (name != "points")


def test_show_points_at_ones_own_image(home, taught, own, tmp_path, capsys):
    own()
    vrrl.save_policy(taught, tmp_path / "model")
    words = ["mode=show", "task=points", f"model={tmp_path / 'model'}", f"runs={tmp_path / 'runs'}", f"image={tmp_path / 'picture3.png'}", "threads=1"]
    vrrl.main([*words, "question=where is it?"])
    strip = Path(capsys.readouterr().out.split()[-1])
    colours = {colour for _, colour in Image.open(strip).convert("RGB").getcolors(1 << 20)}
    assert data_prep.FRAMES[""] in colours and not {data_prep.FRAMES["right"], data_prep.FRAMES["wrong"]} & colours
    assert 'question="..."' in fails(capsys, words)
    assert "image= needs" in fails(capsys, [w if w != "mode=show" else "mode=eval" for w in words])
    assert "picture99" in fails(capsys, [*words[:4], f"image={tmp_path / 'picture99.png'}", "question=where?"])


# ---------------------------------------------------------------- stop, resume, repeat, refuse

KILLER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import vrrl
name, left = sys.argv[2], int(sys.argv[3])   # die in this call of os.replace or os.fsync: inside a write
real = getattr(os, name)

def deadly(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

setattr(os, name, deadly)
vrrl.run_main(vrrl.main, sys.argv[4:])
"""
DECIDED = ("metrics.jsonl", "results.json", "model/model.safetensors")  # what the seed decides


def same_as_smoke(smoke, folder):
    for name in DECIDED:
        assert (folder / name).read_bytes() == (smoke[1] / name).read_bytes(), name
    assert not list(folder.rglob("*.tmp")) and not (folder / "checkpoints").exists()


@pytest.mark.parametrize("kills", [4, pytest.param(24, marks=pytest.mark.skipif("VRRL_LONG" not in os.environ, reason="VRRL_LONG=1 runs it: four minutes"))])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(smoke, home, tmp_path, kills):
    """kill -9 at random moments, a part of them inside a write, data and SFT included; every run that ends must equal the undisturbed one."""
    rng, deaths, ends = random.Random(kills), 0, 0
    words = [w for w in smoke[0] if not w.startswith("data=")]
    folder = tmp_path / "runs" / smoke[1].name
    while deaths < kills or not ends:
        last = deaths >= kills
        how, after = rng.choice(["time", "replace", "fsync"]), rng.randint(1, 40)
        start = [sys.executable, "-c", KILLER, str(vrrl.HERE), "replace" if how == "time" else how, str(10**9 if last or how == "time" else after)]
        run = subprocess.Popen([*start, *words, f"runs={tmp_path / 'runs'}", f"data={tmp_path / 'data'}", "checkpoint=0"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = run.communicate(timeout=rng.uniform(3, 12) if how == "time" and not last else 120)
        except subprocess.TimeoutExpired:
            run.kill()
            out, err = run.communicate()
        if run.returncode == 0:
            same_as_smoke(smoke, folder)
            shutil.rmtree(tmp_path / "runs")
            ends += 1
        else:
            assert run.returncode == -9, err
            deaths += 1


def run_until(words, folder, stage, number, step):
    """Start a run, send it a signal once `stage` has logged `step`; returns (exit code, stderr)."""
    run = subprocess.Popen(command(*words), cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
        if run.poll() is not None or any(f'"stage": "{stage}", "step": {step}' in line for line in lines):
            break
        time.sleep(0.02)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    return run.returncode, err


def stop_words(home):
    return ["profile=smoke", f"model={home / 'model'}", f"data={home / 'data'}", "device=cpu", "threads=1", "buffer.start=1", "rl.steps=8", "sft.steps=1",
            "sft.first_steps=0", "eval.maps=3", "checkpoint=86400", "run=x"]


@pytest.fixture(scope="module")
def whole(smoke, home, tmp_path_factory):
    """The run folder of `stop_words`, not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert subprocess.run(command(*stop_words(home), f"runs={folder}"), cwd=folder, capture_output=True, timeout=100).returncode == 0
    return folder / "x"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_first_and_the_same_command_goes_on(whole, home, tmp_path, number):
    words, stopped = [*stop_words(home), f"runs={tmp_path}"], tmp_path / "x"
    code, err = run_until(words, stopped, "rl", number, 2)
    assert code == 130 and "the same command goes on" in err and list((stopped / "checkpoints").glob("rl-*")), err
    assert subprocess.run(command(*words), cwd=tmp_path, capture_output=True, timeout=100).returncode == 0
    for name in DECIDED:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((stopped / "run.json").read_text())["resumed"]


class Steps:
    """A few steps of a one-number optimizer, as a stage would take them."""

    def __init__(self, folder, every=0):
        self.folder, self.log = folder, vrrl.Log(folder, every)

    def take(self, count, upto=None):
        module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(module.weight)
        self.optimizer, self.seen = data_prep.Optimizer(SimpleNamespace(model=module)), []
        for step in self.log.steps("rl", count, self.optimizer, lambda: {"seen": self.seen}, lambda state: self.seen.extend(state["seen"])):
            if step == upto:
                break
            (module.weight.sum() * step).backward()
            self.optimizer.step(0.1, 1.0)
            self.seen.append(step)
            self.log({"stage": "rl", "step": step})
        return module.weight.item()

    def checkpoints(self):
        return sorted((self.folder / "checkpoints").glob("rl-*"))


def test_a_stage_goes_on_from_its_last_checkpoint(tmp_path):
    whole = Steps(tmp_path / "a")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    expected, part = whole.take(6), Steps(tmp_path / "b")
    part.take(6, upto=4)
    assert [f.name.split("-")[1] for f in part.checkpoints()] == ["0000002", "0000003"]  # the last two are kept
    assert part.take(6) == expected and part.seen == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b""])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
    steps = Steps(tmp_path)
    steps.take(6, upto=4)
    before, last = steps.checkpoints()
    last.write_bytes(damage(last.read_bytes()))
    steps.take(4)
    assert steps.seen == [1, 2, 3, 4] and str(last) in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4  # step 3 is not there twice


def test_a_full_disk_is_one_clear_line_and_leaves_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    steps = Steps(tmp_path)
    steps.take(6, upto=3)
    good = {f: f.read_bytes() for f in steps.checkpoints()}
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "checkpoints"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        vrrl.run_main(lambda words: steps.take(6), [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left" in error and error.splitlines()[-1].startswith("error: ")
    assert good == {f: f.read_bytes() for f in steps.checkpoints()}
    monkeypatch.undo()
    steps.take(6)
    assert steps.seen == [1, 2, 3, 4, 5, 6]


def test_a_model_that_cannot_be_written_is_one_clear_line_and_the_old_one_stays(policy, tmp_path, monkeypatch):
    vrrl.save_policy(policy, tmp_path / "model")
    before = contents(tmp_path)
    def full(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("No space left on device")
    monkeypatch.setattr(policy.tokenizer, "save_pretrained", full)
    with pytest.raises(vrrl.UserError, match="model cannot be written: No space left"):
        vrrl.save_policy(policy, tmp_path / "model")
    assert contents(tmp_path) == before


def test_two_runs_in_one_folder_are_refused_while_the_first_lives(smoke, capsys):
    words, folder, _, _ = smoke
    held = data_prep.lock(folder)
    assert "in use by another process" in fails(capsys, [*words, f"runs={folder.parent}"])
    held.close()
    assert vrrl.run_main(vrrl.main, [*words, f"runs={folder.parent}"]) is None


def test_steps_that_are_not_finite_are_skipped_and_counted_and_many_in_a_row_stop_the_run(home, taught, task, monkeypatch, capsys):
    cfg = settings(home, "method=rl", "rl.steps=30", "rl.questions=2", "rl.samples=2", "rl.max_turns=1")
    policy = vrrl.Policy(copy.deepcopy(taught.model), taught.tokenizer, taught.processor, cfg)
    monkeypatch.setattr(vrrl, "reward", lambda task, e, cfg: sum(e.rest) % 7 / 10 + 0.1)
    monkeypatch.setattr(vrrl, "policy_loss", lambda logps, *args: torch.cat(logps).sum() * math.nan)
    lines = []
    with pytest.raises(vrrl.UserError, match="lower the learning rate"):
        vrrl.rl(policy, taught, task, cfg, Listener(lines))
    assert [m["skipped"] for m in lines if m["kept"]] == list(range(1, 10)) and not any(m["kept"] and math.isfinite(m["grad_norm"]) for m in lines)
    assert furthest(policy.model.parameters(), taught.model.parameters()) == 0


def test_bf16_weights_would_stay_where_they_are_and_the_copies_move():
    module = torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    plain = copy.deepcopy(module)
    start = module.weight.detach().clone()
    ours, theirs = data_prep.Optimizer(SimpleNamespace(model=module)), torch.optim.AdamW(plain.parameters(), lr=5e-7, weight_decay=0.0)
    for _ in range(400):
        for m, step in ((module, lambda: ours.step(5e-7, 1e9)), (plain, lambda: (theirs.step(), theirs.zero_grad()))):
            m.weight.sum().backward()
            step()
    moved = lambda w: (w != start).float().mean().item()
    assert moved(plain.weight) < 0.02 < 0.2 < moved(module.weight)


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(home):
    run = subprocess.run(command("rl.stepz=3"), cwd=home, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "error: unknown setting 'rl.stepz'; nearest: rl.steps\n")


def test_evaluating_a_saved_model_gives_the_runs_figures(smoke, capsys):
    """What `mode=eval` prints for the run's model are the run's own figures, for all that is played greedily."""
    words, folder, _, _ = smoke
    vrrl.main([*words[:1], f"model={folder / 'model'}", *words[2:], f"runs={folder.parent}", "mode=eval"])
    rows = json.loads((folder.parent / f"eval-{folder.name}-model" / "results.json").read_text())["rows"]
    kept = [r for r in json.loads((folder / "results.json").read_text())["rows"] if r["method"] == "vrrl"]
    same = ("split", "n", "first", "final", "committed", "commit", "turns", "first_by_map", "final_by_map")
    assert [{k: r[k] for k in same} for r in rows] == [{k: r[k] for k in same} for r in kept]
    assert f"| {folder.name}-model | id |" in capsys.readouterr().out


# ---------------------------------------------------------------- speed: python test_vrrl.py [gpu] [key=value ...]


class Clock(vrrl.Log):
    """Keeps the seconds and counts of every RL step."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __call__(self, line):
        pass

    def time(self, line):
        self.lines.append(line)


def plain_play(policy, task, starts, samples, max_turns, generator, greedy=False, training=False):
    """`vrrl.play` without its savings: every sample reads its whole conversation, pictures included, again at every turn."""
    episodes = [dataclasses.replace(s, turns=[], question_ids=list(s.question_ids)) for s in starts for _ in range(samples)]
    live, think = episodes, policy.encode("<THINK>")
    for number in range(1, max_turns + 1 if live else 1):
        context = vrrl.Context(len(live), policy.device)
        pictures = [p for e in live for p in [*e.opening_pictures, *e.rest_pictures]]
        for p in pictures:
            p.features = None
        with torch.no_grad():
            policy.extend(context, [[*e.opening, *e.rest] for e in live], pictures)
        forced = [think if e.force_think and number == 1 else [] for e in live]
        for e, opening, (ids, logps) in zip(live, forced, policy.sample(context, forced, greedy, generator)):
            e.turns.append(vrrl.read_turn(policy, task, ids, logps, len(opening)))
        live = [e for e in live if e.turns[-1].kind == "answer" and number < max_turns and vrrl.well_formed(task, e.all_turns, unfinished=True)]
        for e in live:
            vrrl.give_feedback(policy, task, e, e.turns[-1], {})
        if not live:
            break
    return episodes


def speed(words, steps=7):
    """Median seconds of an RL step: plain and as it is; for 1 to 8 turns; for 8 to 32 samples a question."""
    cfg, flat = vrrl.read_config(words)
    torch.set_num_threads(cfg.threads or os.cpu_count())
    task = vrrl.TASKS[cfg.task](cfg)
    _, folder = vrrl.sft_model(cfg, flat, task)

    def row(name, *more, plain=False):
        every = [*words, f"rl.steps={steps}", "rl.questions=16", "rl.max_turns=4", *more]
        cfg = vrrl.read_config([*every, "policy.dtype=float32", "rl.micro=128"] if plain else every)[0]
        policy, reference, clock, play = *(vrrl.load_policy(folder / "model", cfg) for _ in range(2)), Clock(), vrrl.play
        if plain:
            vrrl.play = plain_play
            for p in (policy, reference):
                p.model.config.text_config._attn_implementation = "sdpa"
        try:
            vrrl.rl(policy, reference, task, cfg, clock)
        finally:
            vrrl.play = play
        middle = lambda *keys: sorted(sum(line[k] for k in keys) for line in clock.lines)[len(clock.lines) // 2]
        print(f"| {name} | {middle('rollouts')} | {middle('seconds_sampling', 'seconds_update'):.2f} | {middle('seconds_sampling'):.2f} | {middle('seconds_update'):.2f} "
              f"| {middle('sampled_tokens')} | {middle('trained_tokens')} |", flush=True)

    print("| step | rollouts | seconds | sampling | update | tokens sampled | tokens trained |\n|" + " --- |" * 7)
    row("plain", plain=True)
    row("as it is")
    for turns in (1, 2, 4, 8):
        row(f"{turns} turns", f"rl.max_turns={turns}", "rl.rho=1")
    for samples in (8, 16, 32):
        row(f"{samples} samples", f"rl.samples={samples}")


PEAK = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}  # dense bf16, 10^12 operations a second, by the makers' tables


def gpu(words):
    """`python test_vrrl.py gpu profile=qwen2.5-vl-3b`: one SFT step and five RL steps of a profile, as a row of a table.

    The model has the true architecture and size and random weights; nothing is downloaded. It would never end a turn, so turns are
    `policy.max_new` = 48 tokens long, as a long demonstration's, each counts as another attempt, and rewards are made up: every
    group is trained on. What a step takes then depends on the sizes alone. A word may change any setting.
    """
    given = ["policy.max_new=48", "nav.train_maps=200", "nav.sft_traces=64", "nav.test_maps=4", "nav.dev_maps=4", "sft.steps=1", "rl.steps=5", "buffer.start=1", *words]
    cfg, _ = vrrl.read_config(given)
    if cfg.profile not in ARCHITECTURES:
        raise vrrl.UserError(f"profile={cfg.profile}: one of {', '.join(ARCHITECTURES)}")
    device, task, tokenizer = vrrl.device_of(cfg), vrrl.TASKS[cfg.task](cfg), bpe_tokenizer()
    torch.set_num_threads(cfg.threads or os.cpu_count())
    kind = "qwen2_5_vl" if cfg.profile.startswith("qwen2") else "qwen3_vl"
    size = PREPROCESSOR[kind].get("size") or dict(shortest_edge=PREPROCESSOR[kind]["min_pixels"], longest_edge=PREPROCESSOR[kind]["max_pixels"])
    if kind == "qwen3_vl":
        size = {**size, "shortest_edge": 65536}  # the released one
    keys = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor = Qwen2VLImageProcessorPil(size=size, **{key: PREPROCESSOR[kind][key] for key in keys})

    def load():
        torch.manual_seed(cfg.seed)
        with torch.device(device):
            model = transformers.AutoModelForImageTextToText.from_config(
                architecture(cfg.profile, tokenizer), dtype=vrrl.dtype_of(cfg, device),
                attn_implementation={"text_config": "grouped" if device.type == "cpu" else "sdpa", "vision_config": "sdpa"})
        if cfg.policy.checkpointing:
            data_prep.checkpoint_layers(model)
        return vrrl.Policy(model.eval(), tokenizer, processor, cfg)

    rng, read, real_parse, real_reward = random.Random(0), [], vrrl.parse_turn, vrrl.reward
    policy, clock = load(), Clock()
    sample, log_probs = policy.sample, policy.log_probs

    def ended(*args):
        return [([*ids[:-1], policy.end_id], logps) for ids, logps in sample(*args)]

    def counted(episodes):
        openings = {id(e.question_ids): len(e.opening) for e in episodes}  # one that several share is read once
        read.append(sum(openings.values()) + sum(len(e.rest) for e in episodes))
        return log_probs(episodes)

    policy.sample, policy.log_probs = ended, counted
    vrrl.parse_turn = lambda task, text: ("answer", "hole", tuple(rng.choices(list(MOVES), k=rng.randint(1, 9))))
    vrrl.reward = lambda task, e, cfg: rng.random() * 0.9 + 0.05
    real_well_formed, vrrl.well_formed = vrrl.well_formed, lambda task, turns, unfinished=False: True
    try:
        began = time.time()
        vrrl.sft(policy, task, cfg, vrrl.Log())
        taught = time.time() - began
        read.clear()
        reference = load() if cfg.rl.kl or cfg.rl.measure_kl else None
        vrrl.rl(policy, reference, task, cfg, clock)
    finally:
        vrrl.parse_turn, vrrl.reward, vrrl.well_formed = real_parse, real_reward, real_well_formed
    total = lambda key: sum(line[key] for line in clock.lines)
    rollouts, sampling, update = total("rollouts"), total("seconds_sampling"), total("seconds_update")
    trained = sum(p.numel() for p in policy.model.model.language_model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((most for key, most in PEAK.items() if key in name), None)
    share = f"{6 * trained * sum(read) / update / peak / 1e12:.0%}" if peak else "-"
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "-"
    print("| profile | GPU | optimizer | peak memory, GB | SFT step, s | s a rollout | s an update | tokens sampled a second | tokens read a second, update | share of the bf16 peak |\n|" + " --- |" * 10)
    print(f"| {cfg.profile} | {name} | {data_prep.optimizer_kind(policy.model, cfg, device)} | {memory} | {taught:.2f} | {sampling / rollouts:.3f} | {update / cfg.rl.steps:.1f} "
          f"| {total('sampled_tokens') / sampling:.0f} | {sum(read) / update:.0f} | {share} |", flush=True)


def test_the_command_for_the_gpu_table_works_at_a_tiny_size(home, monkeypatch, capsys):
    tiny = {"text_config": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
            "vision_config": dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)}
    small = {"rope_parameters": dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2])}
    for profile, kept in (("qwen2.5-vl-3b", dict(window_size=112, fullatt_block_indexes=[1])), ("qwen3-vl-2b", dict(deepstack_visual_indexes=[0, 2]))):
        text = {**tiny["text_config"], **small, **({} if "2.5" in profile else {"head_dim": 16})}
        monkeypatch.setitem(ARCHITECTURES, profile, {"text_config": {"vocab_size": 400, **text}, "vision_config": {**tiny["vision_config"], **kept}})
        gpu([f"profile={profile}", "device=cpu", "threads=1", f"data={home / 'gpu'}", "policy.dtype=float32", "policy.max_new=6", "nav.train_maps=40", "nav.sft_traces=16", "sft.batch=4",
             "rl.steps=2", "rl.questions=2", "rl.samples=2", "rl.max_turns=3", "rl.at_once=2", "nav.cell=56"])
        row = capsys.readouterr().out.splitlines()[-1]
        assert row.startswith(f"| {profile} | CPU | ") and row.count("|") == 11 and "nan" not in row


if __name__ == "__main__":
    line, *words = sys.argv[1:] or [""]
    tools = {"processor": print_processor, "gpu": gpu}
    vrrl.run_main(tools.get(line, speed), words if line in tools else sys.argv[1:])

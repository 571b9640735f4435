"""VRRL in one file: visually grounded self-reflection for vision-language models, learnt by RL.

The idea (Tang, Yin, Durrett, arXiv 2607.02490). A vision-language model (VLM) answers a question
about a picture, is shown what its answer does in the picture, and then commits or corrects. Plain
RL makes first answers better and lets the policy forget how to correct, since a correction earns no
more than a right first answer. Where pictures are new, first answers fail, and nothing mends them.
VRRL makes the policy practise corrections: prefix masking (random turn masking, RTM) trains later
turns, and buffered roll-ins start from past answers: wrong ones to correct, right ones to commit.

The algorithm, with the default of each number beside its name (task `grounding`):

    policy pi: a VLM after SFT: sft.first_steps 450 on first answers, sft.steps 40 on demonstrations
    D: two queues of states, wrong and right ones     (buffer.size 4000, buffer.right_share 0.3)
    repeat rl.steps 400 times:
        for each of rl.questions 32 questions:
            with probability rl.rho 0.6: start = the question
            else a roll-in in its place: start = the oldest state of D's right queue (probability
                0.3) or of its wrong queue; if that queue is empty, the question
            sample rl.samples G = 8 rollouts at policy.temperature 0.5, each of at most
                rl.max_turns 3 new turns; each answer but one at the limit gets a feedback picture
            R_i = 0 if malformed, else max(1 if right else 0, 0.1 + 0.9 r_i); a right one loses
                reward.revision 0.05 for each revision. r_i in [0, 1] is the gain: section 6
            A_i = R_i - mean of the other G - 1 rewards    (REINFORCE with a baseline)
            fresh rollouts only: k ~ U{1..T} of the T turns; turns before k leave the loss
        one Adam step (rl.lr 1e-4) on  - 1/(32 G) sum_i A_i sum of log pi over tokens in the loss
        D.append(each fresh rollout up to its first shown wrong answer; if none, its last shown one)

The paper's GRPO also divides A by the group's standard deviation (here with rl.std_norm=yes), and
clips the importance ratio (here 1: each batch is used once). README.md lists what else differs.

Read it from top to bottom, in the order in which an episode lives: 1 settings, 2 tasks (what is
right), 3 conversation (turns as token ids), 4 policy (the VLM), 5 rollouts, 6 reward, 7 buffer,
8 loss, 9 SFT, 10 RL (the loop above), 11 evaluation with probes, 12 a run (workers, checkpoints).
README.md says what a fork changes. `python vrrl.py --help` lists all settings.
"""
import contextlib, dataclasses, datetime, difflib, functools, hashlib, inspect, itertools
import json, math, operator, os, platform, random, re, shutil, signal, sys, time, types
from collections import Counter, deque
from pathlib import Path

import numpy as np
import safetensors.torch, torch, transformers, yaml
from PIL import Image
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen_images
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel as TextModel

import data_prep
from data_prep import UserError, write_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent

# ==================== 1. Settings =================================================================
# config.yaml names every setting once: `name: [default, allowed, sentence]`. A row of `tasks`, one
# of `profiles` and one of `methods` then change defaults, in this order.
def read_config(words=()):
    """The settings as (cfg, flat): cfg.rl.steps and so on, and {"rl.steps": 400, ...}.
    words: `key=value`, or names of YAML files of settings; the later wins. Raises UserError."""
    config, given = read_yaml(HERE / "config.yaml"), {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.endswith((".yaml", ".yml")):
            raise UserError(f"'{word}' is not key=value, nor a YAML file; for example: seed=3")
        given |= {key: value} if equals else flatten(read_yaml(word))
    try:
        table, cfg = flatten(config["settings"]), types.SimpleNamespace()
        flat = {key: default for key, (default, _, _) in table.items()}
        for kind in ("task", "profile", "method"):
            table[kind][1] = "|".join(config[kind + "s"])  # config.yaml says "rows" there
            row = check_value(kind, given.get(kind, flat[kind]), *table[kind][:2])
            flat |= flatten(config[kind + "s"][row])
        for key, value in (flat | given).items():
            if key not in table:
                near = [known for known in table if known.endswith("." + key)]
                near += [*difflib.get_close_matches(key, table, 1), "see --help"]
                raise UserError(f"unknown setting '{key}'; nearest: {near[0]}")
            flat[key] = check_value(key, value, *table[key][:2])
            section, _, name = key.rpartition(".")
            place = vars(cfg).setdefault(section, types.SimpleNamespace()) if section else cfg
            setattr(place, name, flat[key])
        return cfg, flat
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.yaml has lost its form: {error!r}") from None

def read_yaml(file):
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if isinstance(found, dict):
        return found
    raise UserError(f"{file}: not a table of settings; for example a line `seed: 3`")

def flatten(values, before=""):
    """{"rl": {"steps": 3}} -> {"rl.steps": 3}."""
    flat = {}
    for key, value in values.items():
        key = f"{before}{key}"
        flat |= flatten(value, key + ".") if isinstance(value, dict) else {key: value}
    return flat

def check_value(key, value, default, allowed):
    """`value` (a word, or what YAML made of it) in the type of `default`. UserError if not allowed.
    allowed: a range `0..1`, words `a|b|c`, `yes|no`, `text`, or `text X`: one that holds X."""
    text, kind = str(value), type(default)
    if kind is bool and text.lower() in ("yes", "true", "no", "false"):
        return text.lower() in ("yes", "true")
    if kind is str and (text in allowed.split("|")
                        or allowed[:4] == "text" and allowed[5:] in text):
        return text
    if kind in (int, float):
        low, high = map(float, allowed.split(".."))
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:  # false for nan as well
                return kind(text)
    words = allowed.replace("..", " to ").replace("|", ", ") + ", a whole number" * (kind is int)
    raise UserError(f"{key}={text} is not allowed; allowed: {words}")

# ==================== 2. Tasks ====================================================================
class Task:
    """What the model learns. A new task is a subclass, an entry in TASKS and a row in config.yaml.
    Its own texts are settings: add their names to the list in Policy.__init__ (section 4) too.

    An *example* is a dict with id, image (a path), size (width, height) and what the rules need.
    An *answer* is a tuple, which `parse` makes of the text inside <ANSWER>. Write
        __init__(cfg)               super().__init__(cfg, plan, make), as Grounding does
        question(example)           (text before the picture, text after each feedback picture)
        parse(text, last=None)      answer, or None; last: the answer that this one revises
        exact(example, answer)      whether it is right
        progress(example, answer)   p in [0, 1], which the reflection reward credits
        feedback(example, answer, mark=True)   PIL image; mark=False: without the mark (probes)
    and, for demonstrations, right(example, rng) and wrong(example, rng), an answer each, and
    thought(example, answer), the words for what the feedback to a wrong answer shows. `check`,
    `same` (a repetition earns nothing) and `say` may be written anew."""
    splits = ("id",)
    empty_final = False  # whether demonstrations commit with <FINAL></FINAL>

    def __init__(self, cfg, plan, make):
        """Make the data, once. plan: a dict of lists: "test_X" and "dev_X" of each split X ("id"
        first), then "train". For an item (7, "snow"), make(rng, 7, "snow") in data_prep.py gives
        (record, PIL image). The record, with id, image and size added, is an example."""
        if Path(cfg.data).is_file():
            raise UserError(f"data={cfg.data} is a file: it needs task=points")
        name = data_prep.digest_of([plan, data_prep.digest(HERE / "data_prep.py")])
        self.cfg, self.folder = cfg, Path(cfg.data) / f"{cfg.task}-{name}"
        self.splits = [key.removeprefix("test_") for key in plan if key.startswith("test_")]
        data_prep.make_folder(self.folder, cfg.task, plan, make)

    def examples(self, split):
        return data_prep.read_examples(self.folder / f"{split}.jsonl", self.check)
    def check(self, example):
        """UserError unless the record of a data file can be used."""
    def image(self, example):
        return data_prep.cached_image(self.folder / example["image"])
    def same(self, answer, other):
        return answer == other
    def say(self, answer, last=None):
        """The text that states an answer, so that `parse` reads it."""
        return " ".join(map(str, answer))

    def demonstrations(self):
        """SFT traces: a list of (example, turns). A turn is (text, taught), `taught` being the
        leading part of the text that enters the loss. Wrong answers are context, never taught.
        In this one the target is at 1 1; the second column says what is taught.
            <ANSWER>2 3</ANSWER>                                nothing
            <THINK>left 1 up 2</THINK><ANSWER>up 1</ANSWER>     the THINK (2 2 is wrong too)
            <THINK>left 1 up 1</THINK><ANSWER>left 1 up 1</ANSWER>      all
            <FINAL></FINAL>                                             all
        A share sft.multi_share 0.5 has 1 to 4 wrong answers; the others are right at once."""
        found, rng = [], random.Random("demonstrations")
        for example in self.examples("train")[: self.cfg.make.traces]:
            answers, wanted = [self.right(example, rng)], 0
            if rng.random() < self.cfg.sft.multi_share:
                wanted = rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0]
            for _ in range(100 * wanted):  # a box may leave little room for wrong answers
                new = self.wrong(example, rng)
                if not self.exact(example, new) and not any(self.same(new, a) for a in answers):
                    answers.insert(0, new)
                if len(answers) > wanted:
                    break
            turns = []
            for last, answer in zip([None, *answers], answers):
                think = f"<THINK>{self.thought(example, last)}</THINK>" if turns else ""
                text = f"{think}<ANSWER>{self.say(answer, last)}</ANSWER>"
                turns.append((text, text if answer == answers[-1] else think))
            final = f"<FINAL>{'' if self.empty_final else self.say(answers[-1])}</FINAL>"
            found.append((example, [*turns, (final, final)]))
        return found

class Points(Task):
    """Visual grounding: the rules of tasks that point into a box. A subclass needs __init__ alone.
    An example has question, box [x0, y0, x1, y1] in pixels, and `within`, see `exact`; 0: the box.

    An answer is (x, y), whole numbers from 0 to points.scale along each side; with scale 0, pixels
    as the model sees the picture. Feedback is a crop centred on the point, at the picture's own
    scale: a target to the left of the point looks the same in a table and in a chart.

    With points.moves a revised answer is a move from the last point. Without it a small model
    searches the first picture again, and does not use what the crop shows."""
    empty_final = True  # a small model miscopies coordinates: RL would only learn to copy

    check = staticmethod(data_prep.check_figure)
    def question(self, example):
        points = self.cfg.points
        return points.question.replace("{question}", example["question"]), points.reply
    def parse(self, text, last=None):
        """'3 14', '3, 14', '(3, 14)' -> (3, 14). As a move from `last`, (6, 15): 'left 3 up 1'."""
        text, answer = text.strip(), None
        if last and self.cfg.points.moves:
            way = Counter()
            moves = re.findall(r"(left|right|up|down) (\d{1,5})", text, re.A)
            for side, units in moves:
                way[side] += int(units)
            if moves and " ".join(map(" ".join, moves)) == text:  # nothing else is said
                answer = last[0] + way["right"] - way["left"], last[1] + way["down"] - way["up"]
        elif found := re.fullmatch(r"\(?\s*(\d{1,5})(?:\s*,\s*|\s+)(\d{1,5})\s*\)?", text, re.A):
            answer = int(found[1]), int(found[2])
        inside = answer and min(answer) >= 0 and max(answer) <= (self.cfg.points.scale or 10_000)
        return answer if inside else None

    def say(self, answer, last=None):
        return self.move(last, answer) if last and self.cfg.points.moves else super().say(answer)

    def move(self, here, there):
        """The way from a point to another: "left 3 up 1"."""
        words = (there[0] - here[0], "left", "right"), (there[1] - here[1], "up", "down")
        return " ".join(f"{a if n < 0 else b} {abs(n)}" for n, a, b in words if n)

    def ends(self, example):
        """The coordinates of the right and the lower edge."""
        if self.cfg.points.scale:
            return self.cfg.points.scale, self.cfg.points.scale
        return size_seen(example["size"], load_parts(source_of(self.cfg.model))[1])
    def pixel(self, example, answer):
        """An answer as (x, y) in pixels of the image."""
        sides = zip(answer, example["size"], self.ends(example))
        return tuple(a * side / end for a, side, end in sides)
    def centre(self, example):
        x0, y0, x1, y1 = example["box"]
        return (x0 + x1) / 2, (y0 + y1) / 2
    def distance(self, example, answer):
        """From the point to the target's centre, in pixels."""
        return math.dist(self.pixel(example, answer), self.centre(example))

    def exact(self, example, answer):
        """Inside the box, or at most `within` pixels from its centre where the example has it."""
        if example["within"]:
            return self.distance(example, answer) <= example["within"]
        (x, y), (x0, y0, x1, y1) = self.pixel(example, answer), example["box"]
        return x0 <= x < x1 and y0 <= y < y1

    def progress(self, example, answer):
        """p = phi(d) = (exp(-d^2 / s1^2) + exp(-d^2 / s2^2)) / 2, d: `distance`, s2: the side of
        the crop, s1 = 0.4 s2 (paper: s2 = 200, s1 = 80). Without crops half the longer side."""
        d, s2 = self.distance(example, answer), self.cfg.points.crop or max(example["size"]) / 2
        return (math.exp(-((d / (0.4 * s2)) ** 2)) + math.exp(-((d / s2) ** 2))) / 2

    def same(self, answer, other):
        """Nearer than 1/100 of the scale (10 pixels at scale 0): a jitter is no new answer."""
        return math.dist(answer, other) < (self.cfg.points.scale or 1000) / 100

    def feedback(self, example, answer, mark=True):
        """A crop centred on the point, grey beyond the edge; the whole picture where crop is 0."""
        image, point = self.image(example), self.pixel(example, answer)
        if self.cfg.points.crop:
            return data_prep.draw_crop(image, point, self.cfg.points.crop, mark)
        return data_prep.draw_hairs(image, point) if mark else image

    def right(self, example, rng=None):
        """The point of the scale nearest to the target's centre. UserError if it is not right."""
        sides = zip(self.centre(example), example["size"], self.ends(example))
        answer = tuple(math.ceil(c * end / side - 0.5) for c, side, end in sides)  # halves go down
        if self.exact(example, answer):
            return answer
        raise UserError(f"{example['image']}: no point of the scale lies in the box "
                        f"{example['box']}: raise points.scale")

    def wrong(self, example, rng):
        """Half of these lie within a crop of the target, the others anywhere. Some may be right."""
        reach = (self.cfg.points.crop or max(example["size"]) / 2) / 2
        near, answer = rng.random() < 0.5, []
        for c, side, end in zip(self.centre(example), example["size"], self.ends(example)):
            place = rng.uniform(c - reach, c + reach) if near else rng.uniform(0, side)
            answer.append(round(min(max(place / side, 0), 1) * end))
        return tuple(answer)

    def thought(self, example, answer):
        """The move that leads to the target; "far" if the crop does not show it, "here" on it."""
        sides = zip(self.pixel(example, answer), self.centre(example))
        if self.cfg.points.crop and max(abs(p - c) for p, c in sides) >= self.cfg.points.crop / 2:
            return "far"
        return self.move(answer, self.right(example)) or "here"

class OwnPoints(Points):
    """One's own data: `task=points data=FILE`, a JSONL file of {"image", "question", "box"}."""
    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.data).parent
        tokenizer = load_parts(source_of(cfg.model))[0]
        self.own = data_prep.own_examples(cfg.data, functools.partial(check_text, tokenizer))

    def examples(self, split):
        return self.own[split]

class Grounding(Points):
    """The paper's grounding experiment: trained on small tables alone; out of distribution are
    large tables, bar charts, scatter plots, and with points.kind=text inner cells of tables."""
    def __init__(self, cfg):
        plan = data_prep.figure_plan(cfg.points.kind, cfg.make.train, cfg.make.test)
        super().__init__(cfg, plan, data_prep.make_figure)

class Navigation(Task):
    """Spatial navigation on a frozen lake: a shortest way from the elf to the gift, around holes.
    An answer is a tuple of moves. Out of distribution: `size`, larger maps; `look`, new colours."""
    def __init__(self, cfg):
        file = Path(cfg.data) / "data.json"
        if file.is_file():  # made by `python data_prep.py official`
            self.cfg, self.folder = cfg, file.parent
            self.splits = data_prep.read_json(file).get("splits", [])
        else:
            plan = data_prep.navigation_plan(cfg.make.train, cfg.make.test, cfg.nav.cell)
            super().__init__(cfg, plan, data_prep.make_map)

    check = staticmethod(data_prep.check_map)
    def question(self, example):
        return self.cfg.nav.question, self.cfg.nav.reply
    def parse(self, text, last=None):
        """'up, left' -> ("up", "left")."""
        moves = tuple(text.lower().replace(",", " ").split())
        return moves if moves and all(m in data_prep.MOVES for m in moves) else None

    def walk(self, example, answer):
        """The distance to the goal at the start and after each move; "edge" or "hole" ends it."""
        layout = example["layout"]
        distance = data_prep.shortest_distances(layout)
        row, column = data_prep.find_cell(layout, "S")
        found = [int(distance[row, column])]
        for move in answer:
            row, column = row + data_prep.MOVES[move][0], column + data_prep.MOVES[move][1]
            inside = 0 <= row < len(layout) and 0 <= column < len(layout[0])
            if not inside or layout[row][column] == "H":
                return [*found, "hole" if inside else "edge"]
            found.append(int(distance[row, column]))
        return found

    def exact(self, example, answer):
        return self.thought(example, answer) == "exact"

    def thought(self, example, answer):
        """"edge" or "hole", whichever comes first; else "past" (the goal came before the last
        move), "short" (it never came), "longer" (a shorter way exists), or "exact"."""
        left = self.walk(example, answer)
        if left[-1] in ("edge", "hole"):
            return left[-1]
        if 0 not in left:
            return "short"
        if left.index(0) < len(answer):
            return "past"
        return "exact" if len(answer) == left[0] else "longer"

    def progress(self, example, answer):
        """p: how many leading moves each come one nearer to the goal, over the shortest length. A
        way that runs on past the goal is wrong: it gets 0, where this count would give 1."""
        left, good = self.walk(example, answer), 0
        while good + 1 < len(left) and left[good + 1] == left[0] - good - 1:
            good += 1
        return 0.0 if good == left[0] < len(answer) else good / left[0]

    def feedback(self, example, answer, mark=True):
        """The map with the way painted on it."""
        layout, way = example["layout"], answer if mark else ()
        shape, start = (len(layout), len(layout[0])), data_prep.find_cell(layout, "S")
        return data_prep.draw_path(self.image(example), shape, start, way, example["look"],
                                   example.get("box"))

    def right(self, example, rng):
        return tuple(data_prep.shortest_path(example["layout"], rng))
    def wrong(self, example, rng):
        path, exact = list(self.right(example, rng)), functools.partial(self.exact, example)
        return tuple(data_prep.wrong_path(example["layout"], path, exact, rng))

TASKS = {"grounding": Grounding, "points": OwnPoints, "navigation": Navigation}

# ==================== 3. Conversation =============================================================
# The policy says one ANSWER or one FINAL, perhaps after a THINK. A turn keeps the token ids that
# were sampled: these are trained, never text that was encoded again.
TAGS = ["<THINK>", "</THINK>", "<ANSWER>", "</ANSWER>", "<FINAL>", "</FINAL>"]
TAG = re.compile(f"({'|'.join(TAGS)})")
INSIDE = f"((?:(?!{'|'.join(TAGS)}).)*)"  # anything but a tag
TURN = re.compile(rf"\s*(?:<THINK>{INSIDE}</THINK>\s*)?"
                  rf"(?:<ANSWER>{INSIDE}</ANSWER>|<FINAL>{INSIDE}</FINAL>)\s*", re.S)

def parse_turn(task, text, last=None):
    """(kind, thought, answer). kind is "answer", "final" or "bad"; thought is None without a THINK.
    A FINAL commits `last`, the last answer: it is empty or repeats it. Any other FINAL is bad.
        parse_turn(task, "<THINK>up 1</THINK><ANSWER>4 7</ANSWER>") == ("answer", "up 1", (4, 7))"""
    if not (match := TURN.fullmatch(text)):
        return "bad", None, None
    thought, answer, final = match.groups()
    if final is None:
        answer = task.parse(answer, last)
        return "bad" if answer is None else "answer", thought, answer
    commits = last is not None and (not final.strip() or task.parse(final) == last)
    return "final" if commits else "bad", thought, None

def size_seen(size, processor):
    """(width, height) in pixels that an image of this size has when the model sees it."""
    low, high = processor.size["shortest_edge"], processor.size["longest_edge"]  # numbers of pixels
    side = processor.patch_size * processor.merge_size
    return qwen_images.smart_resize(*size[::-1], side, low, high)[::-1]

class Picture:
    """An image as the vision tower takes it. grid: visual tokens (down, across). patches: uint8
    (down * across * merge^2, 3, patch^2) in the library's order: the merge^2 patches of a token
    together. features: what a frozen vision tower made of it, kept so that it is encoded once."""
    def __init__(self, image, processor):
        patch, merge = processor.patch_size, processor.merge_size
        size = size_seen(image.size, processor)
        down, across = size[1] // (patch * merge), size[0] // (patch * merge)
        pixels = np.asarray(image.resize(size, processor.resample))
        pixels = pixels.reshape(down, merge, patch, across, merge, patch, 3)
        self.patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch * patch)
        self.grid, self.features = (down, across), None
        self.patch_grid = (1, down * merge, across * merge)  # time, rows, columns

@dataclasses.dataclass
class Turn:
    """One turn of the policy, and what the user shows next."""
    ids: list  # as sampled, with the end token unless the turn was cut off at policy.max_new
    loss_tokens: list  # for each id: may it enter a loss? In RL all may, in SFT the taught part
    logps: list = ()  # with which they were sampled
    kind: str = "answer"
    thought: str | None = None
    answer: object = None
    text: str = ""
    reply: list = ()  # ids of what the user says next; without feedback it and picture are empty
    picture: Picture | None = None

@dataclasses.dataclass
class Episode:
    """A conversation about one example: the `given` turns that it goes on from, then new ones."""
    example: dict
    question_ids: list
    question_picture: Picture
    start: int = 0  # which start, in training: episodes of one start share their opening
    given: list = dataclasses.field(default_factory=list)
    turns: list = dataclasses.field(default_factory=list)
    forced: list = ()  # ids that open the first new turn and were not sampled
    reward: float = 0.0
    advantage: float = 0.0
    weights: list = ()  # of each action token, in the loss

    @property
    def all_turns(self):
        return [*self.given, *self.turns]
    @property
    def answers(self):
        return [t.answer for t in self.all_turns if t.kind == "answer"]
    @property
    def opening(self):
        """(ids, pictures) up to the first new token."""
        ids = [*self.question_ids, *(i for t in self.given for i in (*t.ids, *t.reply))]
        return [*ids, *self.forced], [self.question_picture, *(t.picture for t in self.given)]
    @property
    def rest(self):
        """(ids, pictures) of the new turns and of the feedback to them."""
        ids = [i for t in self.turns for i in (*t.ids, *t.reply)]
        return ids, [t.picture for t in self.turns if t.picture is not None]
    @property
    def actions(self):
        """Action tokens may enter a loss. Of each: (column in the ids of `rest`, turn from 1)."""
        found, column = [], 0
        for number, turn in enumerate(self.turns, 1):
            found += [(column + i, number) for i, may in enumerate(turn.loss_tokens) if may]
            column += len(turn.ids) + len(turn.reply)
        return found

# ==================== 4. Policy ===================================================================
MARK = "\ue000"  # stands for the policy's words in a chat template; a character that no text has
# Version 5.24 of the library renamed the argument that takes the cache of keys and values.
CACHE = "cache" if "cache" in inspect.signature(TextModel.forward).parameters else "past_key_values"
# `recompute` computes a part again in the backward pass, instead of keeping what it made.
recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

class Context:
    """B conversations as far as the model has read them. Rows of different length share columns:
    where a row has no token, `valid` (B, L) is False and attention skips the column. position (B,):
    the next M-RoPE position. last (B, D): the hidden state that predicts a row's next token."""
    def __init__(self, rows, device):
        self.cache, self.last = transformers.DynamicCache(), None
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)

    def take(self, rows):
        """Keep these rows, in this order. One may be taken several times: a start, G samples."""
        rows = torch.tensor(rows, device=self.valid.device)
        self.cache.batch_select_indices(rows)
        self.valid, self.position, self.last = (
            t.index_select(0, rows) for t in (self.valid, self.position, self.last))

def lora(linear, inputs, output):
    """W x + B A x: a linear map with an adapter, for small cards (Hu et al., arXiv 2106.09685).
    A (rank, in) and B (out, rank) alone are trained. B is 0 at first. lora.on=False: W x."""
    return output + (inputs[0] @ linear.a.T) @ linear.b.T if lora.on else output
lora.on = True

def add_lora(model, rank):
    torch.manual_seed(0)  # the same in all workers
    model.requires_grad_(False)
    for linear in model.model.language_model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            a = torch.randn_like(linear.weight.new_empty(rank, linear.in_features))
            linear.a = torch.nn.Parameter(a / linear.in_features ** 0.5)
            linear.b = torch.nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
            linear.register_forward_hook(lora)

class Policy:
    """A Qwen2.5-VL or Qwen3-VL model with its tokenizer and image processor. `sample` and
    `log_probs` both read with `extend` and score with `log_softmax`: so their log-probs agree."""
    def __init__(self, model, tokenizer, processor, cfg):
        self.model, self.tokenizer, self.processor, self.cfg = model, tokenizer, processor, cfg
        self.device, self.image_id = next(model.parameters()).device, model.config.image_token_id
        self.prompt = functools.cache(self.prompt)  # few texts, many calls
        for name in "policy.system points.question points.reply nav.question nav.reply".split():
            check_text(tokenizer, name, operator.attrgetter(name)(cfg))
        self.end_id = self.prompt("", "")[1]
        self.frozen_vision = cfg.policy.freeze_vision or cfg.policy.lora > 0
        self.keep_features = self.frozen_vision and not is_large(model)
        model.model.visual.requires_grad_(not self.frozen_vision)
        # Only plain tokens and the end of a turn can be sampled. A sampled image placeholder would
        # shift the positions of all that follows; ids beyond the tokenizer's have no text.
        vocabulary = model.get_output_embeddings().weight.shape[0]
        banned = {*tokenizer.all_special_ids, self.image_id, *range(len(tokenizer), vocabulary)}
        self.banned = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.banned[sorted(banned - {self.end_id})] = True

    def encode(self, text):
        """Token ids. Tags are encoded apart, since a tokenizer may join '>' with what follows."""
        return [i for piece in TAG.split(text) if piece
                for i in self.tokenizer.encode(piece, add_special_tokens=False)]

    def prompt(self, question, reply):
        """What the chat template writes around the policy's turns, as ids, an image being one
        placeholder: (all before its first turn, the id that ends a turn, all up to the next)."""
        system, picture, says = self.cfg.policy.system, {"type": "image"}, {"type": "text"}
        talk = [{"role": "system", "content": [says | {"text": system}]}] if system else []
        talk += [{"role": "user", "content": [says | {"text": question}, picture]},
                 {"role": "assistant", "content": [says | {"text": MARK}]},
                 {"role": "user", "content": [picture, says | {"text": reply}]}]
        whole, alone = (self.tokenizer.apply_chat_template(
            part, tokenize=False, add_generation_prompt=True) for part in (talk, talk[:-2]))
        head, rest = whole.split(MARK)
        if head != alone:
            raise UserError(f"model={self.cfg.model}: its chat template opens a turn otherwise "
                            "than it writes one down, as those of thinking models do")
        head, rest = (self.tokenizer.encode(t, add_special_tokens=False) for t in (head, rest))
        return head, rest[0], rest[1:]

    def place(self, ids, picture):
        """`ids` with the one image placeholder repeated for each visual token of the picture."""
        at = ids.index(self.image_id)
        return [*ids[:at], *[self.image_id] * math.prod(picture.grid), *ids[at + 1 :]]

    def encode_pictures(self, pictures):
        """[(visual tokens (down * across, D), their DeepStack features), ...], one a picture."""
        found = {p: p.features for p in pictures if p.features is not None}
        todo = [p for p in dict.fromkeys(pictures) if p not in found]
        # About 4096 visual tokens go through the vision tower at once.
        most = max(1, 4096 // max((math.prod(p.grid) for p in todo), default=1))
        mean, std = (torch.tensor(values, device=self.device)[:, None] for values in
                     (self.processor.image_mean, self.processor.image_std))
        for part in (todo[at : at + most] for at in range(0, len(todo), most)):
            x = torch.from_numpy(np.concatenate([p.patches for p in part])).to(self.device)
            x = ((x.float() / 255 - mean) / std).to(self.model.dtype)[:, :, None]  # equal frames
            x = x.expand(-1, -1, self.processor.temporal_patch_size, -1).flatten(1)
            grids = torch.tensor([p.patch_grid for p in part], device=self.device)
            counts = [math.prod(p.grid) for p in part]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_vision):
                out = self.model.model.get_image_features(x, grids, return_dict=True)
            deep = [d.split(counts) if torch.is_tensor(d) else d
                    for d in getattr(out, "deepstack_features", None) or ()]
            for i, p in enumerate(part):
                found[p] = out.pooler_output[i], [d[i] for d in deep]
                p.features = found[p] if self.keep_features else None
        return [found[p] for p in pictures]

    def extend(self, context, ids, new, pictures=()):
        """Let the model read `ids` (B, W) where `new` (B, W) is True, after what `context` holds,
        which grows. Returns the hidden states (B, W, D). In a row of `new` True comes first, then
        False. pictures: row by row."""
        (rows, width), past = ids.shape, context.valid.shape[1]
        context.valid = torch.cat([context.valid, new], 1)
        embeds, extra = self.model.get_input_embeddings()(ids), {CACHE: context.cache}
        positions = (new.long().cumsum(1) - 1).expand(3, rows, width)
        if pictures:
            seen = ids.eq(self.image_id) & new
            # M-RoPE: a text token takes one step on all three axes. An image's tokens keep the time
            # axis and spread over rows and columns; the text after it goes on from the larger side.
            positions = self.model.model.get_rope_index(
                ids.cpu(), mm_token_type_ids=seen.int().cpu(), attention_mask=new.cpu(),
                image_grid_thw=torch.tensor([p.patch_grid for p in pictures]))[0].to(self.device)
            visual, deep = zip(*self.encode_pictures(pictures))
            embeds = embeds.masked_scatter(seen[..., None], torch.cat(visual).to(embeds.dtype))
            if deep[0]:  # Qwen3-VL adds deeper visual features to its first layers
                extra |= {"visual_pos_masks": seen,
                          "deepstack_visual_embeds": [torch.cat(level) for level in zip(*deep)]}
        # A new column sees what came before, and the new ones up to itself.
        column = torch.arange(past + width, device=self.device)
        mask = context.valid[:, None, None, :] & (column <= column[past:, None])
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=True,
            position_ids=positions + context.position[:, None], **extra).last_hidden_state
        row, end = torch.arange(rows, device=self.device), (new.sum(1) - 1).clamp(min=0)
        advance, last = positions.amax(0)[row, end] + 1, hidden[row, end]
        context.position = context.position + torch.where(new.any(1), advance, 0)
        context.last = last if past == 0 else torch.where(new.any(1)[:, None], last, context.last)
        return hidden

    def log_softmax(self, hidden):
        """Log-probs (..., V) of the next token at the sampling temperature, banned ones -inf."""
        logits = self.model.get_output_embeddings()(hidden).float() / self.cfg.policy.temperature
        return logits.masked_fill(self.banned, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def sample(self, context, luck=None):
        """One turn for each row: a list of (ids, log-probs). UserError if the log-probs of the
        first tokens are not finite. luck: (B, policy.max_new), in [0, 1), decides the tokens, so
        that no row depends on its neighbours; None: greedy."""
        tokens, logps, done = [], [], torch.zeros_like(context.position, dtype=torch.bool)
        for step in range(self.cfg.policy.max_new):
            logp = self.log_softmax(context.last)
            if luck is None:
                token = logp.argmax(-1)
            else:  # the first token at which the summed probability passes the number
                total = logp.to(luck.dtype).exp().cumsum(-1)
                token = torch.searchsorted(total, luck[:, step, None] * total[:, -1:], right=True)
                token = token[:, 0].clamp(max=logp.shape[-1] - 1)
            tokens.append(torch.where(done, -1, token))
            logps.append(logp.gather(1, token[:, None])[:, 0])
            self.extend(context, token[:, None], ~done[:, None])  # the end token is read too
            done = done | (token == self.end_id)
            if done.all():
                break
        if not torch.isfinite(logps[0]).all():
            raise UserError("the policy's log-probs are not finite: lower the learning rate")
        turns = [[t for t in row if t >= 0] for row in torch.stack(tokens, 1).tolist()]
        return [(ids, logp[: len(ids)]) for ids, logp in zip(turns, torch.stack(logps, 1).tolist())]

    def log_probs(self, episodes):
        """Log-probs, with gradients, and entropies of the episodes' action tokens: two lists of
        (action tokens,) tensors. Openings are read once for all episodes of a start."""
        heads = {e.start: e.opening for e in episodes}
        context, rest = Context(len(heads), self.device), [e.rest for e in episodes]
        self.read(context, heads.values())
        if len(heads) < len(episodes):
            context.take([list(heads).index(e.start) for e in episodes])
        last = context.last[:, None]
        hidden = torch.cat([last, self.read(context, rest)], 1)  # column j predicts token j
        at = [(row, column) for row, e in enumerate(episodes) for column, _ in e.actions]
        taken = torch.tensor([rest[row][0][column] for row, column in at], device=self.device)
        row, column = torch.tensor(at, device=self.device).T
        # Logits only where the loss looks, 256 tokens at a time, and computed again in the
        # backward pass: with a real vocabulary they take 0.6 MB a token.
        parts = [recompute(self.score, *part) for part in
                 zip(hidden[row, column].split(256), taken.split(256))]
        counts = [len(e.actions) for e in episodes]
        return tuple(torch.cat(values).split(counts) for values in zip(*parts))

    def read(self, context, texts):
        """`extend` by texts, one a row: (ids, never empty, and pictures). -1 pads short rows."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i, _ in texts], True, -1)
        ids, pictures = ids.to(self.device), [p for _, of_row in texts for p in of_row]
        return self.extend(context, ids.clamp(min=0), ids >= 0, pictures)

    def score(self, hidden, taken):
        """Log-probs of the tokens taken (N,) and entropies (N,), from hidden states (N, D)."""
        logp = self.log_softmax(hidden)
        with torch.no_grad():  # a figure for the log
            entropy = -(logp.exp() * logp.masked_fill(self.banned, 0)).sum(-1)
        return logp.gather(1, taken[:, None])[:, 0], entropy

    def save(self, folder):
        """Write a Hugging Face folder, whole or not at all. UserError if that fails."""
        folder, temporary = Path(folder), Path(f"{folder}.tmp")
        state = self.model.state_dict()
        for name in [n.removesuffix(".a") for n in state if n.endswith(".a")]:  # adapters: merge
            change = state.pop(f"{name}.b") @ state.pop(f"{name}.a")
            state[f"{name}.weight"] = state[f"{name}.weight"] + change
        try:
            self.model.save_pretrained(temporary, state_dict=state)
            self.tokenizer.save_pretrained(temporary)
            self.processor.save_pretrained(temporary)
        except Exception as error:  # the libraries raise many kinds where a disk is full
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"{folder} cannot be written: {error}") from None
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

def source_of(name):
    """What `model=` names: a folder, as it stands or beside this file, or a hub name."""
    folder = Path(name) if Path(name).is_dir() else HERE / name
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model={name} holds adapters alone: merge them into their base first")
    if (folder / "model" / "config.json").is_file():
        raise UserError(f"model={name} is the folder of a run: its model is model={name}/model")
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.exists() or not re.fullmatch(r"(?!assets/|runs/)[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"model={name}: no folder with a config.json; name a Hugging Face folder")
    return name

@functools.lru_cache
def load_parts(source):
    """(tokenizer, image processor). The processor's class needs no torchvision."""
    with cannot_load(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if "image" not in str(tokenizer.chat_template):  # some releases keep it for the processor
            file = transformers.utils.cached_file(source, "chat_template.json")
            tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]
        return tokenizer, qwen_images.Qwen2VLImageProcessorPil.from_pretrained(source)

@contextlib.contextmanager
def cannot_load(source):
    try:
        yield
    except Exception as error:  # half a download, another architecture: many kinds
        line = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"model={source} cannot be loaded: {line}") from None

def check_text(tokenizer, name, text):
    """UserError if a text holds what the tokenizer would take for a special token."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if found := [token for token in [*special, MARK] if token in text]:
        raise UserError(f"{name} holds {found[0]!r}, which means something else to the model")

def device_of(cfg):
    if cfg.device in ("cuda", "mps") and not getattr(torch, cfg.device).is_available():
        raise UserError(f"device={cfg.device}: torch sees none; use device=cpu")
    if cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number < torch.cuda.device_count():
            return torch.device("cuda", number)
        raise UserError("more workers than GPUs: lower --nproc-per-node, or give device=cpu")
    return torch.device("cpu" if cfg.device == "auto" else cfg.device)

def check_parts(name, model, tokenizer, processor, missing):
    """UserError if the parts of a model would give nonsense together."""
    vision, rows = model.config.vision_config, model.get_input_embeddings().weight.shape[0]
    sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    other = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    broken = [n for n, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    faults = {  # the library would make up what is missing
        f"its files lack {len(missing)} tensors, such as {' '.join(missing[:1])}": missing,
        f"patch, merge and frames are {sizes} in the model, {other} in its image processor":
            sizes != other,
        f"its tokenizer has {len(tokenizer)} words, its embedding {rows}": len(tokenizer) > rows,
        f"its weight {' '.join(broken[:1])} is not finite": broken}
    if found := [fault for fault, there in faults.items() if there]:
        raise UserError(f"model={name}: {'; '.join(found)}")

def load_policy(name, cfg):
    """A Policy from a Hugging Face folder or hub name, on cfg.device. UserError if it fails."""
    source, device, dtype = source_of(name), device_of(cfg), cfg.policy.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    with cannot_load(source):
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind not in ("qwen3_vl", "qwen2_5_vl"):
            raise ValueError(f"it is a {kind}, and this program knows qwen3_vl and qwen2_5_vl")
        model, about = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    tokenizer, processor = load_parts(source)
    check_parts(name, model, tokenizer, processor, sorted(about["missing_keys"]))
    if cfg.policy.lora:
        add_lora(model, cfg.policy.lora)
    if is_large(model):
        for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
            layer.forward = functools.partial(checkpointed, layer, layer.forward)
    conv = model.model.visual.patch_embed.proj  # its stride is its kernel: it is a linear map
    conv.forward = functools.partial(as_linear, conv)  # twice as fast on a GPU
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew at each new length
    return Policy(model.to(device).eval(), tokenizer, processor, cfg)

def is_large(model):  # memory then matters more than time: layers and pictures are computed again
    return sum(p.numel() for p in model.parameters()) > 100_000_000
def as_linear(conv, patches):
    return torch.nn.functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)

def checkpointed(layer, forward, hidden, **rest):
    """Gradient checkpointing of a layer: only its input is kept. The library's own switch takes
    the cache away, which holds the shared opening. Here the layer gets a cache of its own, so that
    computing it twice has no side effect, and what is new in it joins the real one afterwards."""
    if not torch.is_grad_enabled():
        return forward(hidden, **rest)
    if (cache := rest.pop(CACHE, None)) is None:  # a layer of the vision tower
        return recompute(functools.partial(forward, **rest), hidden)
    number = layer.self_attn.layer_idx
    past = cache.get_seq_length(number)

    def run(hidden, *old):
        own = transformers.DynamicCache()
        if old:
            own.update(*old, number)
        hidden, kept = forward(hidden, **rest, **{CACHE: own}), own.layers[number]
        return hidden, kept.keys[:, :, past:], kept.values[:, :, past:]

    old = [cache.layers[number].keys, cache.layers[number].values] if past else []
    hidden, *new = recompute(run, hidden, *old)
    cache.update(*new, number)
    return hidden

# ==================== 5. Rollouts =================================================================
def begin(policy, task, example, start=0, spoken=(), feedback=None, image=None):
    """An episode before its first new turn: after the question, or after given turns (`spoken`, the
    ids of each) and the feedback to them. image: in place of the question's, for probes."""
    picture = Picture(image or task.image(example), policy.processor)
    head = policy.place(policy.prompt(*task.question(example))[0], picture)
    episode = Episode(example, head, picture, start)
    for ids in spoken:
        episode.given.append(read_turn(policy, task, episode, ids))
        reply(policy, task, episode, episode.given[-1], feedback)
    return episode

def read_turn(policy, task, episode, ids, logps=()):
    """The next Turn, from its ids. Bad if it was cut off at policy.max_new."""
    forced = () if episode.turns else episode.forced
    text = policy.tokenizer.decode([i for i in (*forced, *ids) if i != policy.end_id])
    last = episode.answers[-1] if episode.answers else None
    parsed = parse_turn(task, text, last) if ids[-1] == policy.end_id else ("bad", None, None)
    return Turn(ids, [True] * len(ids), logps, *parsed, text)

def reply(policy, task, episode, turn, feedback=None):
    """Put the user's reply to an answer into `turn`. feedback(example, answer): the picture to
    show, the task's own by default; the probes show others."""
    image = (feedback or task.feedback)(episode.example, turn.answer)
    turn.picture = Picture(image, policy.processor)
    turn.reply = policy.place(policy.prompt(*task.question(episode.example))[2], turn.picture)

def well_formed(task, turns, unfinished=False):
    """Turn 1 is an ANSWER without THINK; each revision has a THINK; no ANSWER repeats another; one
    FINAL, last, without THINK: A T* F. unfinished: more turns may follow."""
    letters = {("answer", False): "A", ("answer", True): "T", ("final", False): "F"}
    form = "".join(letters.get((turn.kind, turn.thought is not None), "x") for turn in turns)
    answers = [turn.answer for turn in turns if turn.kind == "answer"]
    repeats = any(task.same(a, b) for a, b in itertools.combinations(answers, 2))
    return not repeats and bool(re.fullmatch("(AT*F?)?" if unfinished else "AT*F", form))

@torch.no_grad()
def play(policy, task, starts, samples, max_turns, luck=None, training=False):
    """Roll out `samples` episodes from every start, turn by turn, policy.rows 256 at a time; those
    of one start stand together. starts: Episodes without new turns. luck: see `uniforms`; None:
    greedy. An episode ends with a FINAL, with a turn that cannot be parsed, or after `max_turns`
    new turns; in training also where it is malformed, since it earns 0 whatever follows."""
    most, episodes = max(1, policy.cfg.policy.rows // samples), []
    for at in range(0, len(starts), most):
        part = starts[at : at + most]
        context = Context(len(part), policy.device)
        policy.read(context, [start.opening for start in part])
        context.take([n for n in range(len(part)) for _ in range(samples)])
        live = range(len(episodes), len(episodes) + len(part) * samples)
        episodes += [dataclasses.replace(s, turns=[]) for s in part for _ in range(samples)]
        for number in range(max_turns):
            spoken = policy.sample(context, None if luck is None else luck[live, number])
            shown = {}  # row: its new turn, if it got feedback
            for row, (ids, logps) in enumerate(spoken):
                episode = episodes[live[row]]
                turn = read_turn(policy, task, episode, ids, logps)
                episode.turns.append(turn)
                hopeless = training and not well_formed(task, episode.all_turns, unfinished=True)
                if turn.kind == "answer" and number + 1 < max_turns and not hopeless:
                    reply(policy, task, episode, turn)
                    shown[row] = turn
            if not shown:
                break
            live = [live[row] for row in shown]  # episodes that have ended leave the batch
            context.take([*shown])
            policy.read(context, [(turn.reply, [turn.picture]) for turn in shown.values()])
    return episodes

def uniforms(policy, names, samples, turns):
    """Numbers in [0, 1) that decide what is sampled: (len(names) * samples, turns, policy.max_new).
    They depend on the names alone, such as "seed step number": not on workers, nor on stops."""
    size = (samples, turns, policy.cfg.policy.max_new)
    seeds = [int(hashlib.sha256(name.encode()).hexdigest()[:15], 16) for name in names]
    found = torch.cat([torch.empty(0, *size[1:]), *(torch.rand(
        size, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds)])
    return (found.float() if policy.device.type == "mps" else found).to(policy.device)

# ==================== 6. Reward ===================================================================
def reward(task, episode, cfg):
    """R of an episode, given answers included (cfg: the settings `reward`).
        malformed, or the turn limit without FINAL:  R = 0
        else                                         R = max(R_answer, R_refl) - late
        R_answer = 1 if the last answer is right, else 0
        R_refl   = 0.1 + 0.9 r  [+ bonus r if right]  - cost turns
        r        = clip(sum_t w(p_(t+1) - p_t), 0, 1),   w(d) = d if d >= 0 else worse * d
        late     = revision (answers - 1) if right, else 0
    p_t is `task.progress` of answer t; given turns and the FINAL count as turns too. Defaults:
    grounding: worse 1, bonus 0, cost 0, so that r = clip(last p - first p); navigation: worse 0.5,
    bonus 0.2, cost 0.05; both: revision 0.05. Plain RL (reflection no) has R = R_answer.

    `late` is not in the paper (release: 0.01). Without it an error that is surely mended is free,
    and a policy may err on purpose. In navigation `bonus` pays for one revision where p_1 is 0."""
    if not well_formed(task, episode.all_turns):
        return 0.0
    right = task.exact(episode.example, episode.answers[-1])
    if not cfg.reflection:
        return float(right)
    p = [task.progress(episode.example, answer) for answer in episode.answers]
    gains = [after - before for before, after in itertools.pairwise(p)]
    r = min(1.0, max(0.0, sum(d if d >= 0 else cfg.worse * d for d in gains)))
    r_refl = 0.1 + 0.9 * r + cfg.bonus * r * right - cfg.cost * len(episode.all_turns)
    return max(float(right), r_refl) - cfg.revision * len(gains) * right

# ==================== 7. Buffer ===================================================================
class Buffer:
    """States to start roll-ins from, in two queues: `wrong` ones, whose last answer is wrong, and
    `right` ones, so that the policy practises stopping too: buffer.right_share 0.3 of the space and
    of what is taken. One queue for both would fill up with right states as the policy gets better.
    First in, first out: a state is taken once, or falls out of a full queue. A state is (example
    id, ids of each turn, whether the last answer is right)."""
    def __init__(self, cfg):
        self.cfg, most = cfg, round(cfg.size * cfg.right_share)
        self.wrong, self.right = deque(maxlen=cfg.size - most), deque(maxlen=most)

    def state_of(self, task, episode):
        """The state of a fresh episode that is stored, or None. store=drawn, the default: up to
        its first wrong answer that got feedback, or else up to its last one that did.
        store=committed: its end, with the FINAL cut off."""
        committed = self.cfg.store == "committed"
        shown = [turn for turn in episode.turns if turn.picture is not None]  # the leading turns
        if episode.given or not shown or committed and episode.turns[-1].kind != "final":
            return None  # a roll-in leaves none: states would grow from states
        right = [task.exact(episode.example, turn.answer) for turn in shown]
        many = len(shown) if committed or all(right) else right.index(False) + 1
        return episode.example["id"], [turn.ids for turn in shown[:many]], right[many - 1]

    def add(self, state):
        (self.right if state[2] else self.wrong).append(state)

    def take(self, rng):
        """The oldest state of one of the queues, or None where that queue is empty."""
        queue = self.right if rng.random() < self.cfg.right_share else self.wrong
        return queue.popleft() if queue else None

# ==================== 8. Loss =====================================================================
# REINFORCE: the gradient of E[R] is E[sum_j (R - b) grad log pi(y_j)]. A baseline b that does not
# depend on the actions drops out, since E[grad log pi] = 0, and lowers the variance. The mean
# reward of the other G - 1 rollouts of the same start is such a baseline.
#
# Prefix masking weighs turn t of T new turns by t/T on average. The policy decides T: a commit
# ends the episode. So the weight depends on this turn's and later actions: b does not drop out,
# and early turns of long episodes count less. This bias is the method's own. Roll-ins need no mask:
# their given turns are not trained. All G rollouts share them, so the baseline accounts for them.
def turn_weights(episode, mask, rng):
    """The weight in the loss of an episode's action tokens (paper: random turn masking). none: 1.
    random: turns k..T weigh 1, k ~ U{1..T}. expected: turn t weighs t/T. rng: of this rollout."""
    total, fresh = len(episode.turns), not episode.given
    if fresh and mask == "expected":
        return [t / total for _, t in episode.actions]
    k = rng.randint(1, total) if fresh and mask == "random" else 1
    return [float(t >= k) for _, t in episode.actions]

def advantages(rewards, std_norm=False):
    """A_i = R_i - mean of the others of its group, = G/(G-1) (R_i - mean of all): (N, G) -> (N, G).
    std_norm: divided by the group's standard deviation too, as in GRPO."""
    rewards, group = rewards.double(), rewards.shape[1]  # the fp32 mean of equals may differ
    centred = (rewards - rewards.mean(1, keepdim=True)) * group / (group - 1)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if std_norm else centred

def kl_terms(logp, reference):
    """q - log q - 1 of each token, q = pi_SFT / pi. The mean of its value is KL(pi || pi_SFT), but
    its gradient is that of KL(pi_SFT || pi), as in GRPO."""
    return (reference - logp).exp() - (reference - logp) - 1

def policy_loss(episodes, logps, rollouts, references=None, kl=0.0):
    """L = 1/N sum_i [ - A_i sum_j m_ij log pi(y_ij)  +  kl sum_j (q_ij - log q_ij - 1) ].

    logps, references: a (tokens,) tensor for each episode, which holds A_i and its m_ij. Summed
    over micro-batches it is the batch's loss. N is the number of rollouts: with the number of
    tokens in the loss, which depends on k, `random` would not average to `expected`. The KL term
    holds on masked turns too: otherwise they could drift freely."""
    loss = 0.0
    for i, (e, logp) in enumerate(zip(episodes, logps)):
        loss = loss - e.advantage * (logp.new_tensor(e.weights) * logp).sum()
        if kl:
            loss = loss + kl * kl_terms(logp, references[i]).sum()
    return loss / rollouts

class AdamW:
    """AdamW (betas 0.9, 0.95; decay 0), for bf16 weights with Kahan's sum. A bf16 number has 8
    significant bits: an update below 1/256 of a weight may be rounded away. What rounding takes
    is kept in `lost` and added to the next update. The gradient's norm is clipped to 1. A step
    whose norm is not finite changes nothing; ten in a row raise UserError."""
    def __init__(self, policy):
        self.weights = [p for p in policy.model.parameters() if p.requires_grad]
        names = ["mean", "square"] + ["lost"] * (self.weights[0].dtype == torch.bfloat16)
        self.kept = {name: [torch.zeros_like(p) for p in self.weights] for name in names}
        self.steps, self.skipped = torch.tensor(0), 0

    def state(self):
        """{name: tensor}, weights too: all that a checkpoint needs of model and optimizer."""
        named = {"weight": self.weights, **self.kept}.items()
        return {"steps": self.steps} | {
            f"{name}.{n}": t.detach() for name, tensors in named for n, t in enumerate(tensors)}

    @torch.no_grad()
    def step(self, lr):
        """One update from all workers' gradients (section 12). Clears them; returns their norm."""
        for weight in self.weights:  # zero where a worker had nothing to learn
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if WORKERS > 1:  # a sum, since every loss is divided by the count of the whole batch
                dist.all_reduce(weight.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0).item()
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == 10:
            raise UserError("ten gradients in a row were not finite: lower the learning rate")
        self.steps += not self.skipped
        for weight, *kept in zip(self.weights, *self.kept.values()):
            if not self.skipped:
                self.update(weight, weight.grad.float(), lr, *kept)
            weight.grad = None
        return norm

    def update(self, weight, grad, lr, mean, square, lost=None):
        mean.copy_(mean.float().lerp(grad, 1 - 0.9))
        square.copy_(square.float().lerp(grad * grad, 1 - 0.95))
        bias1, bias2 = 1 - 0.9 ** self.steps.item(), 1 - 0.95 ** self.steps.item()
        change = -lr / bias1 * mean.float() / ((square.float() / bias2).sqrt() + 1e-8)
        if lost is None:
            return weight.add_(change)
        old = weight.float()
        change += lost.float()
        weight.copy_(old + change)
        lost.copy_(change - (weight.float() - old))

# ==================== 9. SFT ======================================================================
def demonstration(policy, task, example, turns, start):
    """A demonstration as an Episode. turns: [(text, the leading part that is taught), ...]."""
    episode = begin(policy, task, example, start)
    for number, (text, taught) in enumerate(turns, 1):
        turn = read_turn(policy, task, episode, [*policy.encode(text), policy.end_id])
        many = len(turn.ids) if taught == text else len(policy.encode(taught))
        turn.loss_tokens = [i < many for i in range(len(turn.ids))]
        episode.turns.append(turn)
        if number < len(turns):
            reply(policy, task, episode, turn)
    return episode

def sft(policy, task, cfg, run):
    """Supervised fine-tuning, twice: `first` teaches first answers on all training pictures, `sft`
    make.traces 128 demonstrations. The loss: mean -log pi(taught token), at policy.temperature."""
    traces = task.demonstrations()
    rng, examples = random.Random("first answers"), task.examples("train")
    right = [f"<ANSWER>{task.say(task.right(example, rng))}</ANSWER>" for example in examples]
    singles = [(example, [(text, text)]) for example, text in zip(examples, right)]
    # Words that the tokenizer lacks would all look the same.
    texts = {text for example, turns in (*traces, *singles)
             for text in (*task.question(example), *(said for said, _ in turns))}
    words = {word for text in texts for word in TAG.sub(" ", text).split()}
    if lost := sorted(w for w in words if policy.tokenizer.unk_token_id in policy.encode(w)):
        raise UserError(f"words that the model's tokenizer does not have: {' '.join(lost[:20])}")
    for stage, steps, data in (("first", cfg.sft.first_steps, singles),
                               ("sft", cfg.sft.steps, traces)):
        made, optimizer = {}, AdamW(policy)
        for step in run.steps(stage, steps, optimizer):
            mine = share(batch_of(range(len(data)), cfg.sft.batch, step, cfg.seed))
            for n in mine:
                made[n] = made.get(n) or demonstration(policy, task, *data[n], n)
            tokens, total = sum(gather([len(made[n].actions) for n in mine])), 0.0
            for part in micro_batches([made[n] for n in mine], cfg.policy.micro):
                logps, _ = policy.log_probs(part)
                loss = -torch.cat(logps).sum() / tokens
                loss.backward()
                total += loss.item()
            warm = min(1.0, step / max(1, min(100, steps // 10)))
            rate = cfg.sft.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            norm = optimizer.step(rate)
            run.log(loss=sum(gather([total])), grad_norm=norm, lr=rate)

def batch_of(items, count, step, seed):
    """Step 1, 2, ... takes the next `count` of endless passes over items, each shuffled by seed."""
    first, skip = divmod((step - 1) * count, len(items))
    order = (random.Random(f"{seed} {n}").sample(items, len(items)) for n in itertools.count(first))
    return [*itertools.islice(itertools.chain.from_iterable(order), skip, skip + count)]

def micro_batches(episodes, size):
    """Slices of at most `size` episodes. Equal lengths stand together, for little padding; within
    a length one start stands together, since its opening is then read once."""
    episodes = sorted(episodes, key=lambda e: (len(e.rest[0]), e.start))
    return [episodes[at : at + size] for at in range(0, len(episodes), size)]

# ==================== 10. RL ======================================================================
def rl(policy, task, cfg, run, reference=None):
    """The algorithm at the head of this file, from the SFT model `policy`. reference: a frozen copy
    of it, for the KL term; with LoRA `policy` itself."""
    questions = {e["id"]: e for e in task.examples("train")}
    optimizer, buffer = AdamW(policy), Buffer(cfg.buffer)
    group, rollouts = cfg.rl.samples, cfg.rl.questions * cfg.rl.samples
    for step in run.steps("rl", cfg.rl.steps, optimizer, buffer):
        # 1. Starts: a question, or a state in which the policy had to commit or correct.
        seed, plan = f"{cfg.seed} {step}", []
        rng = random.Random(seed)
        for key in batch_of([*questions], cfg.rl.questions, step, cfg.seed):
            state = buffer.take(rng) if rng.random() >= cfg.rl.rho else None
            plan.append(state or (key, (), None))
        starts = []
        for n, (key, spoken, right) in share([*enumerate(plan)]):  # the part of this worker
            starts.append(begin(policy, task, questions[key], n, spoken))
            if cfg.buffer.force_think and right is False:  # it cannot commit (authors' release)
                starts[-1].forced = policy.encode("<THINK>")

        # 2. G rollouts from each start, turn by turn.
        luck = uniforms(policy, [f"{seed} {s.start}" for s in starts], group, cfg.rl.max_turns)
        episodes = play(policy, task, starts, group, cfg.rl.max_turns, luck, training=True)

        # 3. Rewards, the advantage of each rollout within its group, and prefix masking.
        paid = [reward(task, e, cfg.reward) for e in episodes]
        advantage = advantages(torch.tensor(paid).view(len(starts), group), cfg.rl.std_norm)
        for n, (e, a) in enumerate(zip(episodes, advantage.flatten().tolist())):
            e.reward, e.advantage = paid[n], a
            e.weights = turn_weights(e, cfg.rl.mask, random.Random(f"{seed} {e.start} {n % group}"))

        # 4. The gradient, a micro-batch at a time. Where A is 0, as in groups of equal rewards, a
        #    rollout is left out, of the KL term too (as in the paper).
        kept, seen = [e for e in episodes if abs(e.advantage) > 1e-6], Counter()
        for part in micro_batches(kept, cfg.policy.micro):
            logps, entropies = policy.log_probs(part)
            lora.on = False  # with adapters the SFT model is the policy without them
            with torch.no_grad():
                references = reference.log_probs(part)[0] if reference else None
            lora.on = True
            loss = policy_loss(part, logps, rollouts, references, cfg.rl.kl)
            loss.backward()
            # Figures for the log. off_policy tells of a wrong cache where it is above rounding.
            now = torch.cat(logps).detach()
            then = now.new_tensor([p for e in part for t in e.turns for p in t.logps])
            kl = kl_terms(now, torch.cat(references)).sum().item() if references else 0.0
            seen.update(episodes=len(part), tokens=len(now), kl=kl,
                        entropy=torch.cat(entropies).sum().item(),
                        off_policy=(now - then).abs().sum().item())

        # 5. One step, states for later roll-ins, a line in the log. The rate rises for 20 steps and
        #    then falls to a tenth along a line.
        rate = cfg.rl.lr * min(step / 20, 1 - 0.9 * (step - 20) / max(1, cfg.rl.steps - 20))
        norm = optimizer.step(rate)
        for state in filter(None, gather([buffer.state_of(task, e) for e in episodes])):
            buffer.add(state)
        outcomes = gather([outcome(task, e) for e in episodes])
        sums = sum(gather([seen]), Counter())
        run.log(**health(outcomes), kept=sums["episodes"] / rollouts,
                wrong_states=len(buffer.wrong), right_states=len(buffer.right), grad_norm=norm,
                lr=rate, **{key: sums[key] / max(1, sums["tokens"])
                            for key in ("entropy", "kl", "off_policy")})

def ratio(values):
    """The mean of a list; None where it is empty."""
    return sum(values) / len(values) if values else None
def averages(outcomes, figures):
    return {figure: ratio([e[figure] for e in outcomes]) for figure in figures.split()}

def outcome(task, episode):
    """What an episode came to, for JSON. right: of each answer, given ones too; never empty."""
    turns, answers = episode.all_turns, episode.answers
    right = [bool(task.exact(episode.example, answer)) for answer in answers] or [False]
    return {"id": episode.example["id"], "example": episode.example, "given": len(episode.given),
            "answers": answers, "last": turns[-1].text,
            "said": [turn.text for turn in turns if turn.kind == "answer"],
            "right": right, "first": right[0], "final": right[-1], "reward": episode.reward,
            "commit": turns[-1].kind == "final", "well_formed": well_formed(task, turns),
            "repeats": any(task.same(a, b) for a, b in itertools.combinations(answers, 2)),
            "turns": len(episode.turns), "shown": sum(t.picture is not None for t in turns)}

def health(outcomes):
    """Early signs of a collapse. commit_wrong: the share of shown wrong answers then committed."""
    fresh = [e for e in outcomes if not e["given"]]
    wrong = [e for e in outcomes if e["given"] and not e["right"][e["given"] - 1]]
    shown = [ok for e in fresh for ok in e["right"][: e["shown"]]]  # of each answer with feedback
    misses = sum(e["commit"] and not e["final"] for e in fresh)
    return {**averages(fresh, "first final commit turns"),
            **averages(outcomes, "reward well_formed repeats"),
            "rollins": ratio([e["given"] > 0 for e in outcomes]),
            "rollin_repair": ratio([e["final"] for e in wrong]),
            "rollin_commit_wrong": ratio([e["commit"] and e["turns"] == 1 for e in wrong]),
            "commit_wrong": misses / shown.count(False) if False in shown else None}

# ==================== 11. Evaluation ==============================================================
# Greedy play. The last answer counts, committed or not. The share of commits is another figure.
def play_greedy(policy, task, cases, cfg, feedback=None, hidden=False):
    """Outcomes of greedy play. cases: (example,) for a whole episode, (example, text) to go on from
    a given wrong first turn. feedback: what is shown after that turn, see `reply`. hidden: the
    question's picture is grey."""
    starts = []
    for example, *texts in share(cases):
        grey = Image.new("RGB", task.image(example).size, "#808080") if hidden else None
        spoken = [[*policy.encode(text), policy.end_id] for text in texts]
        starts.append(begin(policy, task, example, 0, spoken, feedback, grey))
    episodes = play(policy, task, starts, 1, cfg.eval.max_turns)
    return gather([outcome(task, e) for e in episodes])

def probes(task, failed):
    """{name: arguments of `play_greedy`}. A probe changes the feedback to the given wrong turn,
    or the question's picture. Later feedback is true. once_NAME: the share whose next answer is
    right; once_fixed: without a probe. If they are equal, what NAME takes away was not needed.

    unmarked: the true picture without a mark. other_place: another question's wrong answer on this
    picture; unmarked if there is none. other_picture: the feedback of another question. blank:
    plain grey. hidden: the true feedback, but the question's picture is grey."""
    known = [(example, parse_turn(task, text)[2]) for example, text in failed]
    others = {e["id"]: [*known[n + 1 :], *known[: n + 1]] for n, (e, _) in enumerate(known)}

    def other_place(example, answer):
        for _, other in others[example["id"]]:
            if not task.exact(example, other) and not task.same(answer, other):
                return task.feedback(example, other)
        return task.feedback(example, answer, mark=False)

    def other_picture(example, answer):
        other, its_answer = next((e, a) for e, a in others[example["id"]] if e is example
                                 or e["image"] != example["image"])  # at worst the example itself
        return task.feedback(other, its_answer, mark=other is not example)

    def blank(example, answer):
        return Image.new("RGB", task.feedback(example, answer).size, "#808080")

    return {"unmarked": {"feedback": functools.partial(task.feedback, mark=False)},
            "other_place": {"feedback": other_place}, "other_picture": {"feedback": other_picture},
            "blank": {"feedback": blank}, "hidden": {"hidden": True}}

def bits(values):
    """One character a question for paired tests: 1, 0, or - where it was not asked."""
    return "".join("-" if value is None else str(int(value)) for value in values)

def rates(outcomes, most):
    """Figures of a split, rates in [0, 1]; None where nothing was counted. most: the turn limit.
    after_turn: the accuracy had it stopped after 1, 2, ... answers."""
    return {"n": len(outcomes), **averages(outcomes, "first final commit turns"),
            "repair_own": ratio([e["final"] for e in outcomes if not e["first"]]),
            "break": ratio([not e["final"] for e in outcomes if e["first"]]),
            "after_turn": [ratio([e["right"][: n + 1][-1] for e in outcomes]) for n in range(most)],
            "first_by_question": bits(e["first"] for e in outcomes),
            "final_by_question": bits(e["final"] for e in outcomes)}

def evaluate(policy, task, cfg, fixed=None, title="evaluation"):
    """(rows, fixed, outcomes by split): `rates` of each split, with the repair of `fixed` wrong
    first turns, {split: {example id: text}}; None: the policy's own. All models that are compared
    get those of the SFT model. So none gains by failing first."""
    rows, wrong, played = [], {}, {}
    for split in tqdm(task.splits, desc=title, unit="split", disable=RANK > 0):
        examples = task.examples(f"{cfg.eval.splits}_{split}")
        outcomes = played[split] = play_greedy(policy, task, [(e,) for e in examples], cfg)
        wrong[split] = {e["id"]: e["said"][0] for e in outcomes if e["said"] and not e["first"]}
        given = (fixed or wrong)[split]
        failed = [(e, given[e["id"]]) for e in examples if e["id"] in given]
        row = {"split": split, "ood": split != "id", **rates(outcomes, cfg.eval.max_turns)}
        views = {"fixed": {}} | (probes(task, failed) if cfg.eval.probes else {})
        for name, view in views.items():  # repair_: the last answer is right; once_: the next is
            after = {e["id"]: e for e in play_greedy(policy, task, failed, cfg, **view)}
            once = {key: any(e["right"][1:2]) for key, e in after.items()}
            final = {key: e["final"] for key, e in after.items()}
            for figure, right in (("repair", final), ("once", once)):
                row[f"{figure}_{name}"] = ratio(right.values())
                row[f"{figure}_{name}_by_question"] = bits(right.get(e["id"]) for e in examples)
        rows.append(row)
    return rows, fixed or wrong, played

# ==================== 12. A run ===================================================================
# Workers are processes that hold the same model and a share of the questions each; `torchrun`
# starts them. They meet in `gather`, and where AdamW sums their gradients. Worker 0 alone prints
# and writes. Another number of workers is another run: sums round otherwise.
WORKERS = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORKERS > 1 else 0
def share(items):
    """This worker's part of a list: a slice."""
    return items[len(items) * RANK // WORKERS : len(items) * (RANK + 1) // WORKERS]

def gather(items=()):
    """The inverse of `share`: the whole list, from what the workers made of their slices. It waits
    for all of them; without items it does nothing else."""
    parts = [items] * WORKERS
    if WORKERS > 1:
        dist.all_gather_object(parts, items)
    return [*itertools.chain(*parts)]

class Run:
    """The folder of a run: settings.yaml, metrics.jsonl, checkpoints, and at the end the report. A
    run that was stopped goes on with the same command, to the same bytes."""
    def __init__(self, folder, flat, wait=False):
        """Lock the folder. UserError if it holds checkpoints or results of other settings, program,
        model or data. A setting that is newer than the run counts as its default."""
        self.folder, self.began, self.stopping = Path(folder), time.time(), False
        self.metrics, file = self.folder / "metrics.jsonl", self.folder / "settings.yaml"
        if RANK == 0:
            self.lock = data_prep.lock(self.folder, wait)
            made = [*self.folder.glob("*.safetensors"), *self.folder.glob("results.json")]
            before = read_config()[1] | (read_yaml(file) if made else flat)
            for key, value in flat.items():
                if before.get(key) != value and key not in ("run", "data", "mode"):
                    raise UserError(f"{self.folder} holds a run with {key}={before.get(key)}, now "
                                    f"{value} (files: digests): give run=ANOTHER_NAME or remove it")
            write_file(file, yaml.safe_dump(flat, sort_keys=False))
        gather()

    def log(self, **figures):
        for key, value in figures.items():
            if isinstance(value, float):  # JSON has no nan
                figures[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        if RANK == 0:
            with open(self.metrics, "a") as out:
                out.write(json.dumps({"stage": self.stage, "step": self.step, **figures}) + "\n")

    def steps(self, stage, count, optimizer, buffer=None):
        """1 .. count under a progress bar, from the stage's last checkpoint. Writes one every 20
        seconds, or less often: writing takes at most a twentieth of the time."""
        self.stage = stage
        done, saved, cost = self.load(optimizer, buffer), time.time(), 0.0
        handle_signals(self.stop_soon)
        try:
            for self.step in tqdm(range(done + 1, count + 1), initial=done, total=count, desc=stage,
                                  unit="step", disable=RANK > 0):
                yield self.step
                stop = any(gather([self.stopping]))
                due = stop or self.step == count or time.time() - saved > max(20, 20 * cost)
                if RANK == 0 and due and not optimizer.skipped:  # a checkpoint lacks `skipped`
                    saved = time.time()
                    self.save(optimizer, buffer)
                    cost = time.time() - saved
                if stop:
                    raise KeyboardInterrupt
        finally:
            handle_signals(signal.default_int_handler)

    def stop_soon(self, number, frame):
        """Ctrl-C and SIGTERM wait for the end of the step. The second one does not."""
        self.stopping = True
        handle_signals(signal.default_int_handler)

    def save(self, optimizer, buffer):
        """A checkpoint: trained weights, optimizer, buffer, number of the step. That is enough:
        randomness depends on seed and step alone, and frozen weights are in the model's folder. Its
        name has a digest, which tells of damage; then the one before it, kept for that, is used."""
        for old in {*self.folder.glob(f"{self.stage}-*.safetensors")} - {self.good}:
            old.unlink()
        states = json.dumps([*buffer.wrong, *buffer.right] if buffer else []).encode()
        content = optimizer.state() | {"states": torch.tensor([*states], dtype=torch.uint8)}
        temporary = self.folder / "checkpoint.tmp"
        try:
            safetensors.torch.save_file(content, temporary)
            name = f"{self.stage}-{self.step:07d}-{data_prep.digest(temporary)}.safetensors"
            self.good = temporary.rename(self.folder / name)
        finally:  # of a full disk
            temporary.unlink(missing_ok=True)

    def load(self, optimizer, buffer):
        """Restore the stage's last good checkpoint and cut the log back to it. Its step, or 0."""
        self.good, done = None, 0  # good: the last good checkpoint
        for file in sorted(self.folder.glob(f"{self.stage}-*.safetensors")):
            _, step, digest = file.stem.split("-")
            if data_prep.digest(file) == digest:
                self.good, done = file, int(step)
            else:
                print(f"{file} is damaged; the one before it is used", file=sys.stderr)
        if done:
            with safetensors.safe_open(self.good, "pt") as found:
                for name, tensor in optimizer.state().items():
                    tensor.copy_(found.get_tensor(name))
                for state in json.loads(bytes(found.get_tensor("states").tolist())):
                    buffer.add(state)
        gather()
        if RANK == 0:
            lines = [json.dumps(line) + "\n" for line in data_prep.read_lines(self.metrics)
                     if line["stage"] != self.stage or line["step"] <= done]
            write_file(self.metrics, "".join(lines))
        return done

    def finish(self, **content):
        """Write results.json, which says that the run is done, and remove the checkpoints."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
        about = {"seconds": round(time.time() - self.began, 1), "workers": WORKERS,
                 "torch": torch.__version__, "transformers": transformers.__version__,
                 "device": gpu or platform.machine()}
        write_file(self.folder / "results.json", json.dumps({**content, "about": about}, indent=1))
        for file in self.folder.glob("*.safetensors"):
            file.unlink()

def fingerprint(cfg):
    """What a result depends on beside the settings: the contents of program, model and data."""
    name = source_of(cfg.model)
    if Path(name).is_dir():
        model = data_prep.digest(*sorted(f for f in Path(name).glob("*") if f.is_file()))
    else:  # of the hub: the commit, since its files may come later
        model = Path(transformers.utils.cached_file(name, "config.json")).parent.name
    data, files = Path(cfg.data), []
    if data.is_file():  # own data, with the pictures
        files = [data, *(data.parent / e["image"] for e in data_prep.read_examples(data))]
    elif (data / "data.json").is_file():
        files = sorted(f for f in data.rglob("*") if f.is_file())
    return {"program": data_prep.digest(HERE / "vrrl.py", HERE / "data_prep.py"),
            "model_files": model, "data_files": data_prep.digest(*files), "workers": WORKERS}

def sft_model(words, task, parent):
    """(policy, folder) of the SFT model. Methods with equal SFT settings share it."""
    cfg, flat = read_config(words)
    others = "method", "profile", "mode", "run", "data", "rl", "reward", "buffer", "eval"
    decides = {k: v for k, v in flat.items() if k.split(".")[0] not in others} | fingerprint(cfg)
    run = Run(parent / f"sft-{data_prep.digest_of(decides)}", decides, wait=True)
    if not (run.folder / "results.json").is_file():  # no other run can end it: it is locked
        policy = load_policy(cfg.model, cfg)
        sft(policy, task, cfg, run)
        if RANK == 0:
            policy.save(run.folder / "model")
            run.finish()
    gather()
    return load_policy(run.folder / "model", cfg), run.folder

def weight_sum(policy):
    return sum(p.detach().cpu().double().sum().item() for p in policy.model.parameters())

def train(cfg, words, task, run):
    """SFT, RL, evaluation. A stage of 0 steps does nothing."""
    if (run.folder / "results.json").is_file():
        return print((run.folder / "report.md").read_text())
    # The model that all methods are compared with.
    policy, base_folder = sft_model([*words, "method=sft"], task, run.folder.parent)
    file = base_folder / f"evaluation-{data_prep.digest_of(vars(cfg.eval))}.json"
    if any(gather([not file.is_file()])):  # all workers take the same branch
        rows, fixed, _ = evaluate(policy, task, cfg, title="evaluate sft")
        if RANK == 0:
            write_file(file, json.dumps([rows, fixed]))
        gather()
    rows, fixed = data_prep.read_json(file)
    policy, sft_folder = sft_model(words, task, run.folder.parent)
    if cfg.rl.steps:
        before, reference = weight_sum(policy), None
        if cfg.rl.kl:
            reference = policy if cfg.policy.lora else load_policy(sft_folder / "model", cfg)
        rl(policy, task, cfg, run, reference)
        if weight_sum(policy) == before:
            raise UserError("RL changed no weight: in every step all rollouts of a start had equal "
                            "rewards (all wrong: raise sft.first_steps), or the loss is broken")
    own, _, played = evaluate(policy, task, cfg, fixed, f"evaluate {cfg.method}")
    if RANK == 0:
        policy.save(run.folder / "model")
        name = cfg.method + " + RL" * (cfg.method == "sft" and cfg.rl.steps > 0)
        report(run, task, {"sft": rows, name: own}, played, sft_folder)

def report(run, task, models, played, *folders):
    """What people look at: report.md, curves.png, episodes.png; results.json ends the run."""
    data_prep.curves(run.folder / "curves.png",
                     [folder / "metrics.jsonl" for folder in (*folders, run.folder)])
    pool = [e for split in reversed(task.splits) for e in played[split] if e["answers"]]
    pool.sort(key=lambda e: e["first"] >= e["final"])  # repairs come first
    rows = []
    for e in pool[:6]:
        shown = [task.feedback(e["example"], answer) for answer in e["answers"]]
        rows.append({"label": f"{e['id']}   last turn: {e['last']}",
                     "captions": [task.question(e["example"])[0], *e["said"]],
                     "images": [task.image(e["example"]), *shown],
                     "verdicts": ["", *("right" if ok else "wrong" for ok in e["right"])]})
    data_prep.film_strip(run.folder / "episodes.png", rows, run.folder.name)
    table = data_prep.table(models)
    write_file(run.folder / "report.md", table + "\n")
    run.finish(rows=[{"method": m, **row} for m, rows in models.items() for row in rows])
    print(table)

def main(words):
    if {"-h", "--help", "help"} & set(words):
        usage = "usage: python vrrl.py [FILE.yaml] [key=value ...], as in rl.steps=600\n\n"
        return print(usage + (HERE / "config.yaml").read_text())
    cfg, flat = read_config(words)
    source_of(cfg.model)  # what is wrong with it is said before any work
    if WORKERS > 1:  # started by `torchrun`. A worker that ends ends the others: `run_main`
        backend = "gloo" if device_of(cfg).type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # SFT may be awaited
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    name = f"{cfg.task}-{cfg.method}-seed{cfg.seed}"
    if cfg.mode == "eval":
        name = f"eval-{cfg.task}-{'-'.join(Path(cfg.model).parts[-2:])}"
    folder = Path(cfg.run or f"runs/{name}" + f"-{cfg.profile}" * (cfg.profile != "default"))
    print(f"run folder: {folder}")
    task, run = TASKS[cfg.task](cfg), Run(folder, flat | fingerprint(cfg))
    if cfg.mode == "train":
        return train(cfg, words, task, run)
    rows, _, played = evaluate(load_policy(cfg.model, cfg), task, cfg)
    if RANK == 0:
        report(run, task, {cfg.model: rows}, played)

def handle_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
def run_main(function, words):
    """What the user can mend becomes one line and exit code 2."""
    handle_signals(signal.default_int_handler)
    code = 2
    try:
        function(words)
        if WORKERS > 1:  # else its threads may abort the process while it ends
            dist.destroy_process_group()
        return sys.stdout.flush()  # while a closed pipe can still be caught
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on from the last checkpoint", 130
    except UserError as error:
        message = f"error: {error}"
    except BrokenPipeError:  # as in `python vrrl.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except (OSError, safetensors.SafetensorError) as error:  # not allowed, or a full disk
        message = f"error: {error}: the same command goes on from the last checkpoint"
    except (RuntimeError, MemoryError) as error:
        if "gloo" in str(error):
            message, code = "error: another worker has ended", 1
        elif re.search("out of memory|(enough|allocate) memory|MemoryError", f"{error!r}", re.I):
            message = "error: out of memory: lower policy.rows, policy.micro or policy.max_new"
        else:
            raise
    if RANK > 0:  # worker 0 may say the same, and then it ends this process
        time.sleep(3)
    print(message, file=sys.stderr)
    raise SystemExit(code)

if __name__ == "__main__":
    run_main(main, sys.argv[1:])

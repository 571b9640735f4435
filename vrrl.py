"""VRRL, the whole algorithm: visually grounded self-reflection for vision-language models, learnt by reinforcement learning.

The idea (Tang, Yin, Durrett, arXiv 2607.02490). A vision-language model answers a question about an image, is shown
its answer *drawn on the image*, and then either commits to it or corrects it. The paper finds that under plain RL a model learns
to be right at once and hardly to correct, since a right first answer earns the same outcome reward more easily, and that its corrections
follow the text so far and not the picture. Its remedy is prefix masking and buffered roll-ins, with a reward that credits corrections
(`method=rl_reflect` is plain RL with that reward). What they did for the small default model stands in README.md, Results.

    policy pi (a VLM, after SFT on demonstrations of the protocol), roll-in buffer D = deque()
    repeat:
        for each question of the batch:
            with probability rho, or while D is short:   start = the question
            otherwise (buffered roll-in):                start = a stored prefix, mostly one whose last attempt is wrong
                                                                 (then with a forced <THINK>: only a revision can earn a reward)
            sample G rollouts from the start, turn by turn; after each answer, draw it on the image and show it
            R_i = reward of rollout i                    (exact answer, and credit for corrections that progress)
            A_i = R_i - mean of the other G-1 rewards    (REINFORCE with a leave-one-out baseline)
            prefix masking (fresh starts only): k ~ U{1..T}, T its turns; turns before k leave the loss, so that it is about recovery
        gradient step on  - sum_i A_i * sum over the unmasked tokens of log pi(token)
        D.append(at most one prefix of each fresh rollout, cut after an attempt that was drawn)

Groups with equal rewards have no policy gradient and are dropped, not replaced by others. So are those whose mean reward is not within the
release's bounds, 0.01 and 0.99: most of them succeed throughout, and their rewards differ by small terms alone.
"The release" below is the authors' published code, which uses GRPO: it divides by the group's standard deviation (here a
setting), and has an importance ratio and its clipping (each batch is used for one update, so the ratio is one). README.md
lists all that differs.

Read it from top to bottom, in the order in which an episode lives:
     1 settings      config.yaml as dataclasses; a method is a row of settings
     2 task          question, parsing, exact, progress, feedback picture
     3 conversations pictures, turns, episodes: what was said, as ids
     4 policy        the VLM: cached reading and sampling, log-probs; loading
     5 rollouts      multi-turn, from a question or a roll-in prefix
     6 reward        outcome and reflection
     7 roll-ins      the buffer of prefixes; those drawn from it are mostly failed ones
     8 loss          prefix masking, advantages, REINFORCE
     9 SFT           the demonstrations that teach the protocol
    10 RL            the training loop
    11 evaluation    first and final accuracy, repair, in and out of distribution
    12 main          the modes of the command line

`data_prep.py` has what can be read later: making and drawing data, the cache and the attention for a CPU, optimizers, checkpoints, logs and reports.
Run `python vrrl.py` for the default run, `python vrrl.py --help` for every setting. The default model, `assets/embedded`
("the embedded model"; for pointing `assets/embedded-points`), is a tiny Qwen3-VL for a CPU that has learnt to see and not to solve; `model=` takes a real one.
"""
import copy
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import data_prep
from data_prep import Log, Stopped, UserError, device_of, dtype_of, optimizer_for, run_main, save_policy, source_of, write_file

sys.modules.setdefault("vrrl", sys.modules[__name__])  # `python vrrl.py` calls this module __main__; data_prep.py looks for it as vrrl
transformers.utils.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent


# ==================== 1. Settings =====================================================================
# config.yaml names every setting once, with its default, what is allowed, and a sentence. It becomes
# one frozen dataclass with a nested dataclass a section: `cfg.rl.steps`.


def read_config(words=(), file=HERE / "config.yaml"):
    """Settings from config.yaml, then the rows of the task, the profile and the method, a protocol file, and `key=value` words; the later wins.
    (`data_prep.of_method` puts the method's row last: for a study, and for the SFT model that a run is compared with.)

    Returns (cfg, flat): a frozen dataclass, and the same as {"rl.steps": 75, ...}. Raises UserError.
    """
    spec, config = data_prep.settings_table(file)
    given = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' is not key=value; for example: method=rl seed=3")
        given[data_prep.check_key("protocol.file" if key == "protocol" else key, spec)] = text
    flat = {key: default for key, (default, _, _) in spec.items()}
    for table in ("task", "profile", "method"):
        row = str(given.get(table, flat[table]))
        data_prep.check_value(table, row, spec[table])
        flat.update({data_prep.check_key(key, spec): value for key, value in config[table + "s"][row].items()})
    if words_file := given.get("protocol.file", flat["protocol.file"]):
        flat.update(data_prep.read_protocol(words_file))
    flat.update(given)
    flat = {key: data_prep.check_value(key, flat[key], entry) for key, entry in spec.items()}
    return data_prep.nest(flat), flat


# ==================== 2. Task =========================================================================
# A task is a class with SPLITS, key, load, question, image, parse, exact, progress, same and feedback (and lesson, by which the embedded model
# learns to see; Points has more, for data_prep.point_turns). A new one is a new class, a line in TASKS, and in config.yaml its name, its row
# and, if it has settings of its own, a section.


class Navigation:
    """Spatial navigation on a frozen lake: the shortest path from the elf to the gift, around the holes.

    An attempt is a tuple of moves. Training maps are 3x3 to 5x5, in one look ("snow") and random mixes of colours.
    Test splits: `id`, in distribution; `size`, larger grids; `look`, colours (and in two of three looks, holes) never drawn so in training; `both`.
    """

    SPLITS = ("id", "size", "look", "both")
    lesson = staticmethod(data_prep.see_talk)  # what the embedded model sees before it learns the task

    def __init__(self, cfg, show=True):
        # Keyed by its settings, so that the data of a smoke run is never taken for the real thing.
        made, self.words = dataclasses.asdict(cfg.nav), cfg.protocol
        folder = made.pop("folder")
        self.key = data_prep.key_of(folder or made)  # names the data, in folders and in the keys of SFT models
        self.folder = Path(folder or Path(cfg.data) / f"navigation-{self.key}")
        if folder:
            self.SPLITS = data_prep.read_splits(self.folder)
        else:
            data_prep.make_navigation(self.folder, **made, progress=show)

    def load(self, split):
        """Examples of `train`, `sft`, `dev_*` or `test_*`: dicts with id, image, layout, look (and turns, for sft)."""
        check = lambda example: data_prep.check_layout(example.get("layout"))
        return data_prep.read_manifest(self.folder / f"{split}.jsonl", check)

    def question(self, example):
        """The text before the first image, and the text after each feedback image."""
        return self.words.question, self.words.feedback

    def image(self, example):
        return data_prep.cached_image(self.folder / example["image"])

    def parse(self, text):
        """'up, left' -> ("up", "left"); None unless it is one or more moves."""
        moves = tuple(text.lower().replace(",", " ").split())
        return moves if moves and all(m in data_prep.MOVES for m in moves) else None

    def exact(self, example, attempt):
        """The shortest length, no move off the grid, no hole, and the goal reached by the last move."""
        return data_prep.walk(example["layout"], attempt)[0] == "exact"

    def progress(self, example, attempt):
        """p_t in [0, 1]: length of the longest strictly distance-decreasing legal prefix, over the optimal length.

        0 if more moves come after a complete shortest path.
        """
        return data_prep.progress(example["layout"], attempt)

    def same(self, attempt, other):
        """Whether an attempt counts as a repetition of another."""
        return attempt == other

    def feedback(self, example, attempt):
        """The image with the attempt drawn on it."""
        layout, start = example["layout"], data_prep.find_cell(example["layout"], "S")
        shape = len(layout), len(layout[0])
        return data_prep.draw_path(self.image(example), shape, start, attempt, example.get("look", "snow"), example.get("box"))


class Points:
    """Visual grounding: point into a box of the image. Used as it is for one's own data, `task=points data=FILE`, a JSONL of image, question and box;
    Table and Chart only say where other data come from.

    An attempt is (x, y), two integers in the model's own convention: from 0 to `points.scale` along each side of the image, or
    with scale 0 in steps of `points.step` pixels of the image as the model sees it. Feedback is the image, or a crop of it, with the point drawn.
    """

    SPLITS = ("id",)
    lesson = staticmethod(data_prep.point_talk)

    def __init__(self, cfg, show=True):
        self.cfg = cfg.points
        self.processor = None if cfg.points.scale else data_prep.image_processor(source_of(cfg.model))  # `ends` asks it what size the model sees
        self.folder, self.records = self.open(cfg, show)
        decides = {k: v for k, v in dataclasses.asdict(cfg.points).items() if k != "reach"}  # all but what only the reward reads
        self.key = data_prep.key_of([decides, self.folder.name, self.records])

    def open(self, cfg, show):
        """(folder of the images, {split: records} of the splits held in memory; others are read from the folder's files)."""
        if cfg.image:
            return Path(cfg.image).parent, {"own": [data_prep.own_question(cfg.image, cfg.question)]}
        return Path(cfg.data).parent, data_prep.own_points(cfg.data, self.cfg.seed, self.cfg.sft_traces, show)

    def load(self, split):
        """Examples of a split: dicts with id, image, size (width, height), question, box (and turns, for sft)."""
        check = lambda record: data_prep.check_points(record, record["size"])
        records = self.records.get(split) or data_prep.read_manifest(self.folder / f"{split}.jsonl", check)
        return [{**r, "turns": data_prep.point_turns(self, r)} if split == "sft" else r for r in records]

    def question(self, example):
        """The text before the first image, and the text after each feedback image."""
        return self.cfg.question.replace("{question}", example["question"]), self.cfg.reply

    def image(self, example):
        return data_prep.cached_image(self.folder / example["image"])

    def parse(self, text):
        """'3 14', '3, 14' or '(3, 14)' -> (3, 14); None for anything else, or beyond the scale.

        With scale 0 only what lies beyond any image is refused; a point outside this one is drawn at its edge.
        """
        found = re.fullmatch(r"\s*\(?\s*(\d{1,5})\s*[,\s]\s*(\d{1,5})\s*\)?\s*", text, re.A)
        attempt = found and tuple(map(int, found.groups()))
        return attempt if attempt and max(attempt) <= (self.cfg.scale or data_prep.MAX_SIDE) else None

    def ends(self, example):
        """How far coordinates run along each side, in the model's own convention."""
        if self.cfg.scale:
            return self.cfg.scale, self.cfg.scale
        return tuple(side / self.cfg.step for side in size_seen(example["size"], self.processor))

    def pixel(self, example, attempt):
        """An attempt in pixels of the image."""
        return tuple(a / end * side for a, end, side in zip(attempt, self.ends(example), example["size"]))

    def attempt(self, example, pixel):
        """The attempt nearest to a point in pixels; halves are rounded down, so that a box's centre is not rounded out of it."""
        return tuple(math.ceil(p / side * end - 0.5) for p, end, side in zip(pixel, self.ends(example), example["size"]))

    def exact(self, example, attempt):
        """Whether the point lies in the box; None where no box is known."""
        return data_prep.inside(example["box"], self.pixel(example, attempt)) if example["box"] else None

    def progress(self, example, attempt):
        """p_t in [0, 1]: 1 inside the box, else max(0, 1 - d / reach), at most 0.99; d: distance to the box over the image's longer side."""
        if self.exact(example, attempt):
            return 1.0
        distance = data_prep.gap(example["box"], self.pixel(example, attempt)) / max(example["size"])
        return min(0.99, max(0.0, 1 - distance / self.cfg.reach))

    def same(self, attempt, other):
        """Closer than `points.apart`, in shares of the sides (with scale 0, of 1000 pixels): a jitter is not a new attempt."""
        return attempt == other or math.dist(attempt, other) < self.cfg.apart * (self.cfg.scale or 1000 / self.cfg.step)

    def feedback(self, example, attempt):
        """The image, or a crop of it, with the point drawn."""
        crop = self.cfg.crop if self.cfg.feedback == "crop" else 0
        return data_prep.draw_point(self.image(example), self.pixel(example, attempt), crop)


class Table(Points):
    """Tables: the cell in a given row and column.

    `size` has more rows and columns than trained on, `look` other colours and, in one of three looks, headers at another corner.
    """

    SPLITS = Navigation.SPLITS
    FIGURE = "table"

    def open(self, cfg, show):
        made = {k: getattr(cfg.points, k) for k in ("kind", "seed", "train", "sft_traces", "held_back", "test", "dev")}
        folder = Path(cfg.data) / f"{self.FIGURE}-{data_prep.key_of(made)}"
        data_prep.make_figures(folder, self.FIGURE, **made, progress=show)
        return folder, {}


class Chart(Table):
    """Charts: the bar or point that a question names. `size` has more of them, `look` other colours and, in one of three looks, another type."""

    FIGURE = "chart"


TASKS = {"navigation": Navigation, "table": Table, "chart": Chart, "points": Points}

# ==================== 3. Conversations ================================================================
# An episode is a list of turns, and a turn holds the ids that were sampled: nothing is ever decoded and encoded again.
# An `image` is PIL's, a `picture` is a Picture: an image as the model takes it.

# One assistant turn: an optional THINK, then one ANSWER or one FINAL, nothing else.
TAGS = ["<THINK>", "</THINK>", "<ANSWER>", "</ANSWER>", "<FINAL>", "</FINAL>"]
TAG = re.compile(f"({'|'.join(TAGS)})")
INSIDE = f"((?:(?!{'|'.join(TAGS)}).)*)"  # anything but a tag
TURN = re.compile(rf"\s*(?:<THINK>{INSIDE}</THINK>\s*)?(?:<ANSWER>{INSIDE}</ANSWER>|<FINAL>{INSIDE}</FINAL>)\s*", re.S)


def parse_turn(task, text):
    """(kind, thought, attempt): kind is "answer", "final" or "bad"; thought is None without a THINK.

        parse_turn(task, "<THINK>hole</THINK><ANSWER>up left</ANSWER>") == ("answer", "hole", ("up", "left"))
    """
    match = TURN.fullmatch(text)
    if not match:
        return "bad", None, None
    thought, answer, final = match.groups()
    attempt = task.parse(answer if answer is not None else final)
    if attempt is None:
        return "bad", thought, None
    return ("answer" if answer is not None else "final"), thought, attempt


def size_seen(size, processor):
    """(width, height) in pixels that an image of this size has when the model sees it."""
    side, limits = processor.patch_size * processor.merge_size, processor.size  # by their names edges, in truth least and most numbers of pixels
    height, width = smart_resize(size[1], size[0], side, limits["shortest_edge"], limits["longest_edge"])
    return width, height


class Picture:
    """An image as the vision tower takes it: resized to whole visual tokens, still 8-bit.

    pixels: (H, W, 3) uint8 array. rows, cols: visual tokens along each side, after the 2x2 merge.
    """

    def __init__(self, image, processor):
        width, height = size = size_seen(image.size, processor)
        if size != image.size:
            image = image.resize(size, processor.resample)
        self.pixels, side = np.asarray(image), processor.patch_size * processor.merge_size
        self.rows, self.cols = height // side, width // side
        self.features = None  # kept by `encode_pictures` if Policy.keep; policies that share pictures must have equal vision towers, as in `rl`


@dataclasses.dataclass
class Turn:
    """One assistant turn, and what the user showed next.

    ids: its tokens as sampled, with the end token unless the turn was cut off at policy.max_new. trained: for each of them, whether it may enter
    a loss (not a forced token, nor what a demonstration does not teach); looked at in an episode's new turns only. logps: of the policy that sampled; there is no
    importance ratio, only the tests compare them. attempt: what the ANSWER or FINAL says. feedback: ids of the
    user's reply, with `picture`, the attempt drawn; both are empty if the episode ended here.
    """

    ids: list
    trained: list
    logps: list = ()
    kind: str = "answer"
    thought: str | None = None
    attempt: object = None
    text: str = ""
    feedback: list = ()
    picture: Picture | None = None


@dataclasses.dataclass
class Episode:
    """A conversation about `example`: the replayed turns that it goes on from (a roll-in prefix, or a wrong first turn to repair), then new ones."""

    example: dict
    question_ids: list
    question_picture: Picture
    replayed: list = dataclasses.field(default_factory=list)
    turns: list = dataclasses.field(default_factory=list)
    force_think: bool = False  # of roll-ins after a wrong attempt: the first new turn opens with a forced <THINK> (see RollIn)

    @property
    def all_turns(self):
        return [*self.replayed, *self.turns]

    @property
    def attempts(self):  # those of the ANSWERs; what a FINAL says is not counted, even if it differs
        return [t.attempt for t in self.all_turns if t.kind == "answer"]

    @property
    def committed(self):  # ends in a FINAL that repeats the last ANSWER; the episode may be malformed all the same
        last = self.all_turns[-1]
        return last.kind == "final" and bool(self.attempts) and last.attempt == self.attempts[-1]

    # What `Policy.log_probs` reads: the opening, shared by a group, then the rest with its action tokens.
    @property
    def opening(self):
        return [*self.question_ids, *(i for t in self.replayed for i in (*t.ids, *t.feedback))]

    @property
    def opening_pictures(self):
        return [self.question_picture, *(t.picture for t in self.replayed)]

    @property
    def rest(self):
        return [i for t in self.turns for i in (*t.ids, *t.feedback)]

    @property
    def rest_pictures(self):
        return [t.picture for t in self.turns if t.picture is not None]

    @property
    def actions(self):
        """(column in `rest`, number of the new turn from 1) of every token that may be trained."""
        found, start = [], 0
        for number, turn in enumerate(self.turns, 1):
            found += [(start + i, number) for i, on in enumerate(turn.trained) if on]
            start += len(turn.ids) + len(turn.feedback)
        return found


# ==================== 4. Policy =======================================================================


class Context:
    """A batch of B conversations as far as the model has read them.

    Rows of different length share columns: where a row has no token, `valid` (B, L) is False and
    attention skips the column. `position` (B,) is the next M-RoPE position; `last` (B, D) the hidden
    state of each row's last token, which predicts its next one.
    """

    def __init__(self, rows, device):
        self.cache = data_prep.KeyValues()  # of every layer; grows in place while sampling, and by concatenation where gradients flow back through it
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.last = None

    def take(self, rows):
        """Keep these rows, in this order; a row may be taken several times (one prompt, G samples)."""
        self.cache.take(rows)
        self.valid, self.position, self.last = (t.index_select(0, rows) for t in (self.valid, self.position, self.last))


class Policy:
    """A Qwen2.5-VL or Qwen3-VL model with its tokenizer and image processor."""

    def __init__(self, model, tokenizer, processor, cfg):
        self.model, self.tokenizer, self.processor, self.cfg = model, tokenizer, processor, cfg
        self.temperature = cfg.policy.temperature
        self.device = next(model.parameters()).device
        self.mean = torch.tensor(processor.image_mean, device=self.device)
        self.std = torch.tensor(processor.image_std, device=self.device)
        self.freeze_vision(False)
        self.image_id = model.config.image_token_id
        self.prompts = {}  # of `prompt`, which is asked for the same texts again and again
        self.end_id = self.template("", "")[1]
        # Only plain tokens and the end of the turn can be sampled. A sampled image placeholder would shift
        # the positions of all that follows; ids beyond the tokenizer's have no text at all.
        vocab = model.get_output_embeddings().weight.shape[0]
        banned = {*tokenizer.all_special_ids, self.image_id, *range(len(tokenizer), vocab)} - {self.end_id}
        self.banned = torch.zeros(vocab, dtype=torch.bool, device=self.device)
        self.banned[sorted(banned)] = True

    def freeze_vision(self, frozen):
        """Freeze the vision tower, or train it. Frozen, each picture needs encoding only once for as long as it lives, if there is memory to keep its features."""
        self.frozen, self.keep = frozen, frozen and self.cfg.policy.keep_pictures
        self.model.model.visual.requires_grad_(not frozen)

    # ---- words to ids ----------------------------------------------------------------------------

    def encode(self, text):
        """Token ids; tags apart, since a tokenizer may join '>' with what follows and a forced tag must be the learnt one."""
        pieces = [p for p in TAG.split(text) if p]
        return [i for p in pieces for i in self.tokenizer.encode(p, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i != self.end_id])

    def prompt(self, question, reply):
        """(ids up to the assistant's first word, ids between two assistant turns), an image being one placeholder.

        question: text of the first user turn, before its image; reply: of a later one, after its image.
        """
        if (question, reply) not in self.prompts:
            head, _, between = self.template(question, reply)
            self.prompts[question, reply] = head, between
        return self.prompts[question, reply]

    def template(self, question, reply):
        """What the chat template writes around the assistant's turns: (head, the token that closes a turn, between), as ids."""
        words, mark = self.cfg.protocol, "\ue000"  # a private-use character, which no text contains
        picture = {"type": "image"}
        text = lambda t: {"type": "text", "text": t}
        talk = [{"role": "system", "content": [text(words.system)]}] if words.system else []
        talk += [{"role": "user", "content": [text(question), picture]},
                 {"role": "assistant", "content": [text(mark)]},
                 {"role": "user", "content": [picture, text(reply)]}]
        talk = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        head, between = talk.split(mark)
        ids = lambda t: tuple(self.tokenizer.encode(t, add_special_tokens=False))
        closing, *between = ids(between)  # the model samples the token that closes its turn
        return ids(head), closing, tuple(between)

    def picture(self, image):
        return Picture(image, self.processor)

    def place(self, ids, picture):
        """`ids` with the one image placeholder repeated, once for each visual token of `picture`."""
        at = ids.index(self.image_id)
        return [*ids[:at], *[self.image_id] * (picture.rows * picture.cols), *ids[at + 1 :]]

    # ---- pictures to vectors ---------------------------------------------------------------------

    def encode_pictures(self, pictures):
        """Visual tokens of each picture: a list of ((rows * cols, D), its DeepStack features).

        Each distinct picture is encoded once; with self.keep, once for as long as it lives.
        """
        features = {id(q): q.features for q in pictures if self.keep and q.features is not None}
        distinct = {id(q): q for q in pictures if id(q) not in features}.values()
        p, m = self.processor.patch_size, self.processor.merge_size
        size = lambda q: q.pixels.shape
        for shape, group in itertools.groupby(sorted(distinct, key=size), key=size):
            group = list(group)
            most = max(1, min(256, (1 << 22) // (shape[0] * shape[1])))  # pictures a pass: 4 M pixels
            for part in (group[i : i + most] for i in range(0, len(group), most)):
                x = torch.from_numpy(np.stack([q.pixels for q in part])).to(self.device).float() / 255
                x = ((x - self.mean) / self.std).to(self.model.dtype)
                # (N, H, W, 3) -> rows of patches in the library's order: merge blocks, then the patches of a block,
                # each (channel, frame, y, x). A still image counts as two equal frames.
                n, (height, width, _) = len(part), shape
                x = x.view(n, height // (p * m), m, p, width // (p * m), m, p, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
                x = x.unsqueeze(6).expand(*x.shape[:6], self.processor.temporal_patch_size, p, p)
                x = x.reshape(n * (height // p) * (width // p), -1)
                grid = torch.tensor([[1, height // p, width // p]] * n, device=x.device)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                    out = self.model.model.get_image_features(x, grid, return_dict=True)
                deep = getattr(out, "deepstack_features", None) or []
                deep = [d.chunk(n) if torch.is_tensor(d) else d for d in deep]  # older versions of the library leave the pictures together
                for i, q in enumerate(part):
                    features[id(q)] = (out.pooler_output[i], [d[i] for d in deep])
                    if self.keep:
                        q.features = features[id(q)]
        return [features[id(q)] for q in pictures]

    # ---- the one primitive: read more of a conversation --------------------------------------------

    def extend(self, context, rows, pictures=()):
        """Let the model read `rows` (a list of B id lists) after what `context` holds, which grows. Returns the hidden states (B, W, D) of the new columns.

        `pictures`: those of the first row in order, then of the second, and so on. Rows are padded on the right with masked columns.
        """
        lengths = torch.tensor([len(r) for r in rows], device=self.device)
        width = int(lengths.max())
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=self.device)
        column = torch.arange(width, device=self.device)
        new = column < lengths[:, None]
        past = context.valid.shape[1]
        context.valid = torch.cat([context.valid, new], 1)
        positions, advance = column.expand(3, len(rows), width), lengths
        embeds, extra = self.model.get_input_embeddings()(ids), {}
        if pictures:
            grids = iter([(p.rows, p.cols) for p in pictures])
            steps = [self.positions(r, grids) for r in rows]
            padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]))) for p, _ in steps]
            positions = torch.tensor(np.stack(padded, 1), device=self.device)
            advance = torch.tensor([a for _, a in steps], device=self.device)
            features = self.encode_pictures(pictures)
            seen = ids.eq(self.image_id) & new
            embeds = embeds.masked_scatter(seen[..., None], torch.cat([f for f, _ in features]).to(embeds.dtype))
            if features[0][1]:  # Qwen3-VL adds deeper visual features to its first layers
                deep = [torch.cat(level) for level in zip(*(d for _, d in features))]
                extra = {"visual_pos_masks": seen, "deepstack_visual_embeds": deep}
        mask = context.valid[:, None, None, :]
        if width > 1:  # a new column sees what came before, and the new ones up to itself
            mask = mask & (torch.arange(past + width, device=self.device) <= past + column[:, None])
        hidden = self.run(context, embeds, mask, positions + context.position[:, None], **extra)
        context.position = context.position + advance
        context.last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        return hidden

    def run(self, context, embeds, mask, positions, **extra):
        """The language model on new columns: embeds (B, W, D), mask (B, 1, 1 or W, L + W), positions (3, B, W)."""
        out = self.model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                                              past_key_values=context.cache, use_cache=True, **extra)
        context.cache.length += embeds.shape[1]  # every layer writes its new keys from there on, so it moves after the last one
        return out.last_hidden_state

    def positions(self, ids, grids):
        """M-RoPE positions (3, W) of one row, counted from 0, and by how much they advance.

        A text token takes one step on all three axes. An image's tokens keep the time axis and spread over
        rows and columns; the text after it goes on from the larger side.
        """
        parts, start = [], 0
        for is_image, run in itertools.groupby(ids, key=lambda i: i == self.image_id):
            count = sum(1 for _ in run)
            if is_image:
                rows, cols = next(grids)
                at = np.indices((1, rows, cols)).reshape(3, -1)
                parts.append(at + start)
                start += max(rows, cols)
            else:
                parts.append(np.broadcast_to(np.arange(count) + start, (3, count)))
                start += count
        return np.concatenate(parts, 1), start

    def log_softmax(self, hidden):
        """Log-probs (..., V) of the next token, over the tokens that may be sampled, at the sampling temperature."""
        logits = self.model.get_output_embeddings()(hidden).float() / self.temperature
        return logits.masked_fill(self.banned, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def sample(self, context, forced, greedy=False, generator=None):
        """One assistant turn for each row: a list of (token ids, their log-probs), with the end token unless cut off at policy.max_new.

        forced: a list of B id lists; a row's turn starts with these instead of sampled tokens.
        """
        size, max_new = len(forced), self.cfg.policy.max_new
        start = torch.full((size, max_new), -1, device=self.device)
        for row, ids in enumerate(forced):
            if ids:
                start[row, : len(ids)] = torch.tensor(ids, device=self.device)
        tokens, logps, done = [], [], torch.zeros(size, dtype=torch.bool, device=self.device)
        for step in range(max_new):
            logp = self.log_softmax(context.last)
            if not torch.isfinite(logp.amax()):
                raise UserError("the policy's log-probs are not finite: lower the learning rate and give run=ANOTHER_NAME")
            token = logp.argmax(-1) if greedy else torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
            token = torch.where(start[:, step] >= 0, start[:, step], token)
            tokens.append(torch.where(done, -1, token))
            logps.append(logp.gather(1, token[:, None])[:, 0])
            self.read_token(context, token, ~done)  # the end token too: the feedback comes after it
            done = done | (token == self.end_id)
            if done.all():
                break
        tokens, logps = torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist()
        turns = [[t for t in row if t >= 0] for row in tokens]
        return [(ids, logp[: len(ids)]) for ids, logp in zip(turns, logps)]

    def read_token(self, context, token, new):
        """`extend` by one token for the rows in `new` (B,), without leaving the device."""
        context.valid = torch.cat([context.valid, new[:, None]], 1)
        embeds = self.model.get_input_embeddings()(token)[:, None]
        positions = context.position[None, :, None].expand(3, -1, 1)
        hidden = self.run(context, embeds, context.valid[:, None, None, :], positions)[:, 0]
        context.position = context.position + new
        context.last = torch.where(new[:, None], hidden, context.last)

    def log_probs(self, episodes):
        """Log-probs, with gradients, and entropies of the action tokens of Episodes.

        Returns two lists of (action tokens,) tensors. An opening that several episodes share is read once: rollouts of one
        start hold the very same objects (see `play`), so their identity tells.
        """
        openings, opening_of = {}, []  # {opening: its first episode}; the number of each episode's opening
        for e in episodes:
            opening = (id(e.question_ids), *map(id, e.replayed))
            openings.setdefault(opening, e)
            opening_of.append(list(openings).index(opening))
        heads = list(openings.values())
        context = Context(len(heads), self.device)
        self.extend(context, [e.opening for e in heads], [p for e in heads for p in e.opening_pictures])
        if len(heads) < len(episodes):
            context.take(torch.tensor(opening_of, device=self.device))
        first, rows = context.last[:, None], [e.rest for e in episodes]
        hidden = self.extend(context, rows, [p for e in episodes for p in e.rest_pictures])
        hidden = torch.cat([first, hidden], 1)  # column j now predicts token j of the row
        at = [(row, column) for row, e in enumerate(episodes) for column, _ in e.actions]
        row, column = torch.tensor(at, device=self.device).T
        taken = torch.tensor([rows[r][c] for r, c in at], device=self.device)
        # With checkpointing the logits are made a part at a time, and again in the backward pass.
        score = functools.partial(data_prep.in_parts, self.score) if self.cfg.policy.checkpointing else self.score
        counts = [len(e.actions) for e in episodes]
        return [found.split(counts) for found in score(hidden[row, column], taken)]  # logits only where the loss looks

    def score(self, hidden, taken):
        """Log-probs of the tokens taken (N,) and entropies (N,), from the hidden states (N, D) that predict them."""
        logp = self.log_softmax(hidden)
        with torch.no_grad():  # a figure for the log: nothing is kept for a backward pass
            entropy = -(logp.exp() * logp.masked_fill(self.banned, 0)).sum(-1)
        return logp.gather(1, taken[:, None])[:, 0], entropy


def load_policy(name, cfg):
    """A Policy from a Hugging Face folder or hub name. UserError if there is none."""
    return Policy(*data_prep.load_model(name, cfg), cfg)


# ==================== 5. Rollouts =====================================================================


def begin(policy, task, example):
    """An episode before its first turn."""
    picture = policy.picture(task.image(example))
    head, _ = policy.prompt(*task.question(example))
    return Episode(example, policy.place(head, picture), picture)


def give_feedback(policy, task, episode, turn, drawn):
    """The user's reply to an attempt: its picture and the words around it become part of `turn`. `drawn`: a cache."""
    key = episode.example["id"], turn.attempt
    if key not in drawn:
        drawn[key] = policy.picture(task.feedback(episode.example, turn.attempt))
    turn.picture = drawn[key]
    _, between = policy.prompt(*task.question(episode.example))
    turn.feedback = policy.place(between, turn.picture)


def read_turn(policy, task, ids, logps=(), forced=0):
    """A Turn from its ids; the first `forced` of them were not sampled. A turn cut off before its end token is bad."""
    text = policy.decode(ids)
    parsed = parse_turn(task, text) if ids[-1] == policy.end_id else ("bad", None, None)
    return Turn(ids, [i >= forced for i in range(len(ids))], logps, *parsed, text)


def resume(policy, task, example, spoken, force_think=False):
    """An episode that goes on after given turns, each a list of ids, and the feedback to them."""
    episode = begin(policy, task, example)
    for ids in spoken:
        turn = read_turn(policy, task, ids)
        give_feedback(policy, task, episode, turn, {})
        episode.replayed.append(turn)
    episode.force_think = force_think
    return episode


def well_formed(task, turns, unfinished=False):
    """The protocol: turn 1 is an ANSWER without THINK; each revision has a THINK; no two ANSWERs are the same;
    exactly one FINAL, last, without THINK, repeating the last ANSWER's attempt exactly (`same` is not enough). An empty THINK is a THINK.
    unfinished: the FINAL may still come.
    """
    attempts = []
    for turn in turns:
        if turn.kind == "final":
            return turn is turns[-1] and turn.attempt in attempts[-1:] and turn.thought is None
        needs_think = bool(attempts)
        if turn.kind == "bad" or needs_think != (turn.thought is not None):
            return False
        if any(task.same(turn.attempt, a) for a in attempts):
            return False
        attempts.append(turn.attempt)
    return unfinished


def solved(task, episode, which=-1):
    """Whether the last attempt (which=0: the first) is exact, committed or not; False without an attempt."""
    return bool(episode.attempts) and task.exact(episode.example, episode.attempts[which])


def play(policy, task, starts, samples, max_turns, generator, greedy=False, training=False):
    """Roll out `samples` continuations of every start, all of them turn by turn as one batch.

    starts: Episodes without new turns. Returns len(starts) * samples Episodes, those of one start together.
    An episode ends at FINAL, at a turn that cannot be parsed, or after `max_turns` new turns. In training it
    also ends where it is already malformed: its reward is 0 whatever follows.
    """
    with torch.no_grad(), data_prep.one_thread(policy):
        context = Context(len(starts), policy.device)
        policy.extend(context, [s.opening for s in starts], [p for s in starts for p in s.opening_pictures])
        context.take(torch.arange(len(starts), device=policy.device).repeat_interleave(samples))
        episodes = [dataclasses.replace(s, turns=[]) for s in starts for _ in range(samples)]
        live, drawn, think = episodes, {}, policy.encode("<THINK>")
        for number in range(1, max_turns + 1):
            forced = [think if e.force_think and number == 1 else [] for e in live]
            going = []
            for row, (ids, logps) in enumerate(policy.sample(context, forced, greedy, generator)):
                episode, turn = live[row], read_turn(policy, task, ids, logps, len(forced[row]))
                episode.turns.append(turn)
                hopeless = training and not well_formed(task, episode.all_turns, unfinished=True)
                if turn.kind == "answer" and number < max_turns and not hopeless:  # at the turn limit nothing could follow a feedback
                    give_feedback(policy, task, episode, turn, drawn)
                    going.append(row)
            if not going:
                break
            live = [live[row] for row in going]  # finished rows leave the batch
            context.take(torch.tensor(going, device=policy.device))
            policy.extend(context, [e.turns[-1].feedback for e in live], [e.turns[-1].picture for e in live])
    return episodes


# ==================== 6. Reward ======================================================================


def reward(task, episode, cfg):
    """R of one episode; a roll-in's stored attempts count as well: their progress, repetitions and revisions.

        malformed: 0        committed and exact: 1 + bonus * reflection - revision_cost * revisions
        committed and wrong: form + (1 - form) * reflection
        turn limit reached without FINAL, exact or not: 0, or if `unfinished` > 0: unfinished + (1 - unfinished) * reflection
        reflection = clip(sum_t w(p_{t+1} - p_t), 0, 1),  w(d) = d for d >= 0, worse * d for d < 0

    Where `bonus` is above `revision_cost`, failing first and then correcting pays more (up to 1.09 by default) than being right at once
    (1): a policy may learn to start low, so first attempts are reported with every result.
    p_t in [0, 1] is the progress of attempt t; `worse` below 1 (0.5 in the paper) also pays for going down and up again. Without
    reflection shaping reflection and revisions count 0. `unfinished` is 0 in the paper: a wrong answer that is committed in time
    then pays more than another attempt at the turn limit. Above 0, long conversations that solve nothing pay as well.
    The embedded model points with form = bonus = 0 and unfinished = 0.3: there the turn limit pays more than a wrong commit.
    cfg: the section `reward` of the settings.
    """
    if not well_formed(task, episode.all_turns, unfinished=cfg.unfinished > 0):
        return 0.0
    attempts = episode.attempts
    p = [task.progress(episode.example, a) for a in attempts]
    gains = [after - before for before, after in zip(p, p[1:])] if cfg.reflection else []
    reflection = min(1.0, max(0.0, sum(d if d >= 0 else cfg.worse * d for d in gains)))
    if not episode.committed:
        return cfg.unfinished + (1.0 - cfg.unfinished) * reflection
    if task.exact(episode.example, attempts[-1]):
        return 1.0 + cfg.bonus * reflection - cfg.revision_cost * len(gains)
    return cfg.form + (1.0 - cfg.form) * reflection


# ==================== 7. Roll-in buffer ==============================================================


@dataclasses.dataclass
class RollIn:
    """A stored prefix: the ids of an episode's first turns, up to a decision to commit or to revise, labelled by the last attempt.

    After a wrong attempt the next turn opens with a forced <THINK>, after which only a revision is well formed. So such a roll-in
    trains the revision and what follows; whether to revise is learnt from fresh episodes and from right prefixes.
    """

    example: dict
    turns: list  # a list of ids each; their pictures are drawn again
    right: bool
    step: int  # optimizer step at which it was sampled

    def start(self, policy, task):
        """The episode to go on with, as it was when it was cut."""
        return resume(policy, task, self.example, self.turns, force_think=not self.right)


class RollInBuffer:
    """First in, first out. A prefix was sampled by the policy of its step, and is stale `max_age` optimizer steps later.

    In the default run a step stores some 50 prefixes, so that the deque drops them long before `max_age`.
    """

    def __init__(self, cfg):
        self.cfg, self.entries = cfg, deque(maxlen=cfg.size)

    def add(self, task, episode, step, rng):
        """Store one prefix of a fresh episode, if it offers one.

        The release cuts only episodes that end in FINAL. A model that seldom commits wrong answers would then
        leave the buffer without failures, so we cut before any decision that follows a drawn attempt.
        """
        if episode.replayed:  # roll-ins never enter: prefixes would grow out of prefixes
            return
        cuts = [n for n, t in enumerate(episode.turns[: self.cfg.max_attempts], 1)
                if t.picture is not None and well_formed(task, episode.turns[:n], unfinished=True)]
        stored = sum(e.example["id"] == episode.example["id"] for e in self.entries)
        if not cuts or stored >= self.cfg.per_question:
            return
        cut = rng.choice(cuts)
        right = task.exact(episode.example, episode.turns[cut - 1].attempt)
        self.entries.append(RollIn(episode.example, [t.ids for t in episode.turns[:cut]], right, step))

    def draw(self, step, rng):
        """A RollIn, or None while fewer than `start` of the stored prefixes are within `max_age`. Where none has the label drawn, any of them."""
        young = [e for e in self.entries if step - e.step <= self.cfg.max_age]
        if len(young) < self.cfg.start:
            return None
        right = rng.random() >= self.cfg.wrong_share
        return rng.choice([e for e in young if e.right == right] or young)

    def state(self):
        """The entries as JSON can hold them."""
        return [[e.example["id"], e.turns, e.right, e.step] for e in self.entries]

    def restore(self, state, examples):
        examples = {e["id"]: e for e in examples}
        self.entries.extend(RollIn(examples[name], *rest) for name, *rest in state)


# ==================== 8. Loss ========================================================================


def turn_weights(episode, prefix_mask, rng):
    """Prefix masking: the weight in the loss of every action token of an episode, in order.

    none:     every turn weighs 1.
    random:   k ~ U{1..T}; turns k..T weigh 1, those before 0. T: its turns, a malformed one being the last. (The paper's random turn masking, RTM.)
    expected: its average over k: turn t weighs P(k <= t) = t / T.
    Roll-in episodes are not masked: their replayed turns are not trained anyway.

    Both forms are biased, equally on average: later actions decide T, and the longer an episode becomes, the less its early turns weigh, for good
    or ill. So a baseline no longer cancels in the expectation. With a fixed T it would, and turns would only be weighed differently.
    """
    total = len(episode.turns)
    if prefix_mask == "none" or episode.replayed:
        weight = lambda t: 1.0
    elif prefix_mask == "expected":
        weight = lambda t: t / total
    else:
        k = rng.randint(1, total)
        weight = lambda t: float(t >= k)
    return [weight(t) for _, t in episode.actions]


def advantages(rewards, std_norm=False):
    """A_i = R_i - mean of the others in its group = G/(G-1) (R_i - mean of all). rewards (N, G) -> (N, G).

    std_norm: divided by the group's standard deviation as well.
    """
    group = rewards.shape[1]
    centred = (rewards - rewards.mean(1, keepdim=True)) * group / (group - 1)
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if std_norm else centred


def kl_terms(logp, ref):
    """r - log r - 1 with r = pi_SFT / pi, token by token: never below 0, and on average over samples KL(pi || pi_SFT).

    Differentiated as a loss, as GRPO does, its expected gradient is that of KL(pi_SFT || pi).
    """
    return (ref - logp).exp() - (ref - logp) - 1


def policy_loss(logps, reference, advantage, weights, kl, rollouts):
    """Prefix-masked REINFORCE for some episodes of a batch; summed over micro-batches it is the batch's loss.

        L = 1/N sum_i sum_j [ - A_i m_ij log pi(y_ij)  +  kl * (r_ij - log r_ij - 1) ],  r = pi_SFT / pi,  j: the sampled tokens of rollout i

    logps, reference, weights: one (tokens,) tensor an episode, reference being looked at only with a KL term; advantage: (episodes,).
    N, the number of rollouts sampled, divides, not the number of unmasked tokens: a divisor that depends on k would make the
    average of `random` differ from `expected`.
    The KL term holds on all sampled tokens of the kept groups: otherwise masked turns could drift freely.
    """
    loss = 0.0
    for logp, ref, advantage_i, mask in zip(logps, reference, advantage, weights):
        loss = loss - advantage_i * (mask * logp).sum()
        if kl:
            loss = loss + kl * kl_terms(logp, ref).sum()
    return loss / rollouts


# ==================== 9. SFT =========================================================================


def demonstration(policy, task, example):
    """An SFT trace as an Episode. `loss` says what of a turn is taught; the wrong attempts of a trace never are:

        <ANSWER>up</ANSWER>                        false: nothing
        <THINK>hole</THINK><ANSWER>left</ANSWER>   "think": the THINK alone
        <THINK>short</THINK><ANSWER>down</ANSWER>  true: all
        <FINAL>down</FINAL>                        true
    """
    episode, drawn = begin(policy, task, example), {}
    for number, given in enumerate(example["turns"], 1):
        turn = read_turn(policy, task, [*policy.encode(given["text"]), policy.end_id])
        think = policy.encode(given["text"].split("<ANSWER>")[0])
        taught = len(think) if given["loss"] == "think" else len(turn.ids) if given["loss"] else 0
        turn.trained = [i < taught for i in range(len(turn.ids))]
        episode.turns.append(turn)
        if turn.kind == "answer" and number < len(example["turns"]):
            give_feedback(policy, task, episode, turn, drawn)
    return episode


def supervise(policy, batch, steps, lr, title, log):
    """AdamW on the mean negative log-prob of the taught tokens; `batch(step)` is a list of Episodes.

    The rate warms up over a tenth of the steps (100 at most) and falls to a tenth along a cosine. `log.steps` counts from 1, or goes
    on from the last checkpoint; `log` writes a line to metrics.jsonl; `optimizer.step` clips, updates and clears the gradients.
    """
    optimizer, warmup = optimizer_for(policy), max(1, min(100, steps // 10))
    for step in log.steps(title, steps, optimizer):
        rate = lr * min(1.0, step / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        episodes = sorted(batch(step), key=lambda e: len(e.opening) + len(e.rest))  # little padding
        tokens, micro = sum(len(e.actions) for e in episodes), policy.cfg.sft.micro
        loss_of = lambda part: (-torch.cat(policy.log_probs(part)[0]).sum() / tokens,)
        parts = [episodes[i : i + micro] for i in range(0, len(episodes), micro)]
        # Forward and backward of each part; the gradients add up.
        total = sum(loss for loss, in data_prep.backward(policy, loss_of, parts))
        norm = optimizer.step(rate, clip=1.0)
        log({"stage": title, "step": step, "loss": total, "grad_norm": norm, "skipped": optimizer.skipped, "lr": rate})


@functools.lru_cache(maxsize=8)
def order(count, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def items_of(items, count, step, seed):
    """The `count` items of a step (1, 2, ...); each pass over the items is in a new order.

    Order depends on step and seed alone, so that a run that goes on after a stop draws the same.
    """
    return [items[order(len(items), seed, n // len(items))[n % len(items)]] for n in range((step - 1) * count, step * count)]


def sft(policy, task, cfg, log):
    """Stage `first`: the first answer alone. It is the hard part for a small model, and costs little without the turns that follow.

    Stage `sft`: whole traces, with the protocol, first answers, and corrections of given wrong attempts.
    """
    policy.freeze_vision(cfg.sft.freeze_vision)
    examples = task.load("sft")
    # A trace's last turn is a FINAL with the right answer; as an ANSWER, alone, it teaches the first attempt.
    answer = lambda e: {**e, "turns": [{"text": e["turns"][-1]["text"].replace("FINAL", "ANSWER"), "loss": True}]}
    for title, steps, traces in (("first", cfg.sft.first_steps, map(answer, examples)), ("sft", round(cfg.sft.steps * cfg.sft.times), examples)):
        if not steps:
            continue
        traces = [demonstration(policy, task, e) for e in traces]
        if policy.keep:  # now, in one order: rounding depends on which pictures are encoded together
            with torch.no_grad():
                policy.encode_pictures([p for e in traces for p in (*e.opening_pictures, *e.rest_pictures)])
        supervise(policy, lambda step: items_of(traces, cfg.sft.batch, step, cfg.seed), steps, cfg.sft.lr, title, log)


# ==================== 10. RL =========================================================================


def average(values):
    """Mean of some numbers or truths; None if there are none."""
    values = list(values)
    return sum(values) / len(values) if values else None


WARMUP = 20  # steps in which the learning rate rises


def rl(policy, reference, task, cfg, log):
    """VRRL, or what the method's row leaves of it, from the SFT model `policy`; `reference` is its frozen copy, or None."""
    policy.freeze_vision(cfg.rl.freeze_vision)
    if reference:
        reference.freeze_vision(True)
        reference.keep = policy.keep  # memory: features are worth keeping only where both models use them
    optimizer, buffer = optimizer_for(policy), RollInBuffer(cfg.buffer)
    examples, group = task.load("train"), cfg.rl.samples
    at_once = max(1, (cfg.rl.at_once or cfg.rl.questions * group) // group)  # questions

    def roll_out(starts, generator):
        parts = (starts[at : at + at_once] for at in range(0, len(starts), at_once))
        return [e for part in parts for e in play(policy, task, part, group, cfg.rl.max_turns, generator, training=True)]

    # Counts 1, 2, ... under a progress bar, writes checkpoints between steps, and goes on from the last one after a stop.
    for step in log.steps("rl", cfg.rl.steps, optimizer, state=buffer.state, restore=lambda state: buffer.restore(state, examples)):
        began = time.time()
        # All that is random in a step hangs on the seed and its number alone: a run that was stopped goes on as if it had not been.
        rng, generator = random.Random(f"{cfg.seed} {step}"), torch.Generator(policy.device).manual_seed(1_000_003 * cfg.seed + step)

        # --- sample: each question from its start with probability rho, or in its place a stored prefix, of any question
        fresh, rolled = [], []
        for example in items_of(examples, cfg.rl.questions, step, cfg.seed):
            rollin = buffer.draw(step, rng) if rng.random() >= cfg.rl.rho else None
            if rollin:
                rolled.append(rollin.start(policy, task))
            else:
                fresh.append(begin(policy, task, example))
        # Apart, since openings differ much in length; both may take max_turns new turns.
        fresh, rolled = roll_out(fresh, generator), roll_out(rolled, generator)
        episodes, sampled = fresh + rolled, time.time()

        # --- advantages: within each group of rollouts from one start
        rewards = torch.tensor([reward(task, e, cfg.reward) for e in episodes]).view(-1, group)
        advantage = advantages(rewards, cfg.rl.std_norm).flatten().to(policy.device)
        # Groups without signal are dropped, see the top of the file.
        mean, spread = rewards.mean(1), rewards.max(1).values - rewards.min(1).values
        kept = [n for n in range(len(rewards)) if spread[n] > 1e-6 and 0.01 < mean[n] < 0.99]

        # --- update: one gradient step on this batch
        tokens, entropy, divergence = add_gradient(policy, reference, episodes, data_prep.by_length(episodes, kept, group), advantage, cfg.rl, rng)
        rate = cfg.rl.lr * min(step / WARMUP, 1.0 - 0.9 * (step - WARMUP) / max(1, cfg.rl.steps - WARMUP))
        norm = optimizer.step(rate, cfg.rl.clip) if kept else 0.0

        # --- roll-ins for later steps; in random order, so that the caps favour no question
        for n in rng.sample(range(len(episodes)), len(episodes)):
            buffer.add(task, episodes[n], step, rng)

        # Counts of this step alone; trained tokens are those read by the update, masked ones included.
        log.time({"stage": "rl", "step": step, "rollouts": len(episodes), "seconds_sampling": sampled - began,
                  "seconds_update": time.time() - sampled, "sampled_tokens": sum(len(t.ids) for e in episodes for t in e.turns),
                  "trained_tokens": tokens})
        log({"stage": "rl", "step": step, "rollouts": step * len(episodes), "reward": rewards.mean().item(), **health(task, fresh, rolled, cfg),
             "entropy": entropy, "kl": divergence, "kept": len(kept) / len(rewards),
             "rollins": len(rolled) / len(episodes), "buffer": len(buffer.entries),
             "buffer_wrong": average(not e.right for e in buffer.entries),
             "buffer_age": average(step - e.step for e in buffer.entries),
             "grad_norm": norm, "skipped": optimizer.skipped, "lr": rate})
        log.bar.set_postfix(reward=f"{rewards.mean().item():.2f}")


def add_gradient(policy, reference, episodes, rows, advantage, cfg, rng):
    """Adds up the gradient of a batch's loss, a micro-batch at a time; the optimizer's step is still to come.

    rows: which episodes, shortest first and in pairs of one group, since a pair reads its opening once. advantage: (episodes,).
    Returns (action tokens read, masked ones included; their mean entropy; mean KL to the SFT model). Without a KL term in the loss the KL is measured on
    the first micro-batch only, which has the shortest rollouts. cfg: the section `rl`.
    """
    if not rows:
        return 0, None, None
    weights = {i: torch.tensor(turn_weights(episodes[i], cfg.prefix_mask, rng), device=policy.device) for i in rows}
    parts = [rows[at : at + cfg.micro] for at in range(0, len(rows), cfg.micro)]

    def loss_of(part):
        batch = [episodes[i] for i in part]
        logps, entropies = policy.log_probs(batch)
        refs, divergence, compared = [None] * len(batch), 0.0, 0
        if reference and (cfg.kl or part == parts[0]):
            with torch.no_grad():
                refs = reference.log_probs(batch)[0]
                divergence, compared = kl_terms(torch.cat(logps), torch.cat(refs)).sum().item(), sum(map(len, logps))
        loss = policy_loss(logps, refs, advantage[part], [weights[i] for i in part], cfg.kl, len(episodes))
        return loss, sum(map(len, logps)), torch.cat(entropies).sum().item(), divergence, compared

    _, tokens, entropy, divergence, compared = map(sum, zip(*data_prep.backward(policy, loss_of, parts)))
    return tokens, entropy / tokens, divergence / compared if compared else None


def health(task, fresh, rolled, cfg):
    """What a collapse would show in first, as a part of a line of metrics.jsonl.

    Not quite the `first` and `final` of an evaluation: they are sampled, and training ends an episode where it is already malformed.
    """
    return {"first": average(solved(task, e, 0) for e in fresh), "final": average(solved(task, e) for e in fresh),
            "rollin_repair": average(solved(task, e) for e in rolled if e.force_think),
            "commit": average(e.committed for e in fresh),
            "well_formed": average(well_formed(task, e.all_turns, cfg.reward.unfinished > 0) for e in fresh + rolled),
            "repeats": average(any(task.same(a, b) for a, b in itertools.combinations(e.attempts, 2)) for e in fresh + rolled),
            "turns": dict(sorted(Counter(len(e.turns) for e in fresh).items()))}


# ==================== 11. Evaluation =================================================================


def rates(task, episodes, most):
    """A row of figures from greedy episodes: rates in [0, 1], None where nothing was counted. most: the turn limit.

    What ends in `_by_map` has a character a map (1, 0, - not counted), for paired tests.
    """
    first, final = [solved(task, e, 0) for e in episodes], [solved(task, e) for e in episodes]
    reached = lambda e, turn: solved(task, e, min(turn, len(e.attempts) - 1))  # attempt t is turn t; who stops keeps the last one
    return {
        "n": len(episodes), "first": average(first), "final": average(final),  # the first or the last ANSWER is exact
        "committed": average(ok and e.committed for ok, e in zip(final, episodes)),  # final, and committed
        "repair_own": average(ok for ok, was in zip(final, first) if not was),  # final, of those whose first is wrong or no answer
        "break": average(not ok for ok, was in zip(final, first) if was),  # not final, of those whose first is right
        "commit": average(e.committed for e in episodes),  # ends in a FINAL that repeats the last ANSWER
        "turns": average(len(e.turns) for e in episodes),
        "after_turn": [average(reached(e, turn) for e in episodes) for turn in range(most)],  # final, had it stopped after 1, 2, ... turns
        "first_by_map": data_prep.bits(first), "final_by_map": data_prep.bits(final)}


def evaluate(policy, task, cfg, fixed=None, title="evaluation", brief=False):
    """Greedy play, sampled play and repair of given wrong first turns, on every split. Returns (rows, fixed, greedy episodes by split).

    rows: `rates` a split, with sampled_final, repair_fixed and n_fixed, how many. fixed: {split: {example id: token ids}}, wrong first turns of the SFT
    model: all models that are compared repair these same turns, so that none gains by failing first. None: the model's own ones. Unlike in
    training, no <THINK> is forced: a model must itself see that it has to revise. With cfg.eval.probes, repair is also measured with
    the false pictures of `data_prep.probes`. brief: greedy play only.
    """
    rows, wrong, greedy_play = [], {}, {}
    generator = torch.Generator(policy.device).manual_seed(cfg.seed)
    passes = 1 if brief else 6 if cfg.eval.probes else 3  # greedy; sampled; repair with true pictures; with each of three false ones
    bar = tqdm(total=passes * len(task.SPLITS), desc=title, unit="pass", dynamic_ncols=True)

    def run(starts, greedy=True, shown=task):
        def go(part):
            if Stopped.asked:
                raise Stopped
            return play(policy, shown, part, 1, cfg.eval.max_turns, generator, greedy)

        parts = [starts[at : at + cfg.eval.batch] for at in range(0, len(starts), cfg.eval.batch)]
        # Sampled parts draw from one generator, so they take turns.
        episodes = [e for part in (data_prep.in_threads(policy, go, parts) if greedy else map(go, parts)) for e in part]
        bar.update()
        return episodes

    for name in task.SPLITS:
        examples = task.load(f"{cfg.eval.splits}_{name}")[: cfg.eval.maps]
        own = greedy_play[name] = run([begin(policy, task, e) for e in examples])
        # A first turn that parses can be drawn, and so be repaired.
        wrong[name] = {e.example["id"]: e.turns[0].ids for e in own if e.attempts and not solved(task, e, 0)}
        row = {"split": name, "ood": name != "id", **rates(task, own, cfg.eval.max_turns)}
        rows.append(row)
        if ours := sum("drawn" in example for example in examples):  # the authors' data: pictures drawn here, their PNG being absent
            row["drawn"] = ours
        if brief:
            continue
        row["sampled_final"] = average(solved(task, e) for e in run([begin(policy, task, e) for e in examples], greedy=False))
        given = (fixed or wrong)[name]
        failed = [e for e in examples if e["id"] in given]
        views = {"fixed": task}
        if cfg.eval.probes:
            attempts = [read_turn(policy, task, given[e["id"]]).attempt for e in failed]
            for probe, picture in data_prep.probes(task, list(zip(failed, attempts))).items():
                views[probe] = copy.copy(task)  # the same task, with other pictures for feedback
                views[probe].feedback = picture
        for name_of_view, view in views.items():
            played = run([resume(policy, view, e, [given[e["id"]]]) for e in failed], shown=view)
            repaired = {e.example["id"]: solved(task, e) for e in played}
            row |= {f"repair_{name_of_view}": average(repaired.values()), "n_fixed": len(repaired),
                    f"repair_{name_of_view}_by_map": data_prep.bits(repaired.get(e["id"]) for e in examples)}
    bar.close()
    return rows, fixed or wrong, greedy_play


# ==================== 12. Main =======================================================================


APART_FROM_SFT = ("method", "profile", "mode", "run", "runs", "data", "results", "checkpoint", "see", "rl", "reward", "buffer", "eval",
                  "study", "nav", "points", "image", "question")  # do not change the SFT model; those of a task come in by task.key


def sft_model(cfg, flat, task):
    """(policy, folder) of the SFT model, trained now or by an earlier run: methods with equal SFT settings share it."""
    decides = {k: v for k, v in flat.items() if k.split(".")[0] not in APART_FROM_SFT}
    decides |= {"data": task.key, "threads": torch.get_num_threads()}
    weights = sorted(Path(source_of(cfg.model)).glob("model*.safetensors"))  # an embedded model made anew is another model
    decides["weights"] = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in weights]
    folder = Path(cfg.runs) / f"sft-{data_prep.key_of(decides)}"
    with data_prep.lock(folder, wait=True):  # another method may be training the same SFT model: then it is ours as well
        if not (folder / "model" / "config.json").is_file():
            policy, log = load_policy(cfg.model, cfg), Log(folder, cfg.checkpoint)
            sft(policy, task, cfg, log)
            log.stage("sft")
            save_policy(policy, folder / "model")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return load_policy(folder / "model", cfg), folder


def evaluated(folder, policy, task, cfg):
    """(rows, fixed) of the SFT model, kept in its folder."""
    file = folder / f"evaluation-{data_prep.key_of(dataclasses.asdict(cfg.eval))}.json"
    with data_prep.lock(folder, wait=True):
        if not file.is_file():
            rows, fixed, _ = evaluate(policy, task, cfg, title="evaluate sft")
            write_file(file, json.dumps({"rows": rows, "fixed": fixed}))
    found = json.loads(file.read_text())
    return found["rows"], found["fixed"]


def train(cfg, flat, words, folder):
    """SFT, then RL, then evaluation: the method's row decides which parts do anything. `folder` is the run's own."""
    if not data_prep.open_run(folder, flat):  # finished before
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # in case it was killed just there
        return print((folder / "report.md").read_text())
    log, task = Log(folder, cfg.checkpoint), TASKS[cfg.task](cfg)
    print(f"run folder: {folder}", file=sys.stderr)
    log.stage("data")
    base_cfg, base_flat = read_config(data_prep.of_method(words, "sft"))  # the SFT model that every method is compared with
    data_prep.check_memory(source_of(cfg.model), cfg, device_of(cfg), dtype_of(cfg, device_of(cfg)), task)
    base, base_folder = sft_model(base_cfg, base_flat, task)
    log.stage("sft")
    models = {}
    models["sft"], fixed = evaluated(base_folder, base, task, base_cfg)
    log.stage("evaluate sft")
    del base
    gc.collect()  # its memory is needed, and it refers to itself
    policy, own_folder = sft_model(cfg, flat, task)  # the one that RL starts from: the same, except for sft_long
    if not (folder / "checkpoints").is_dir():  # not going on after a stop: begin with the lines of SFT
        write_file(folder / "metrics.jsonl", (own_folder / "metrics.jsonl").read_text())
    log.stage("start model")
    if cfg.rl.steps:
        reference = load_policy(own_folder / "model", cfg) if cfg.rl.kl or cfg.rl.measure_kl else None
        rl(policy, reference, task, cfg, log)
        del reference
        log.stage("rl")
    known = own_folder == base_folder and not cfg.rl.steps  # the SFT model itself: only episodes to draw are missing
    rows, _, episodes = evaluate(policy, task, cfg, fixed, f"evaluate {cfg.method}", brief=known)
    models[cfg.method] = models["sft"] if known else rows
    log.stage("play" if known else f"evaluate {cfg.method}")
    save_policy(policy, folder / "model")
    print("\n" + data_prep.report(folder, cfg, task, models, data_prep.differences(models), data_prep.choose(task, episodes)))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def main(words):
    if any(w in ("-h", "--help", "help") for w in words):
        return print(__doc__.split("\n\n")[0] + "\n\nusage: python vrrl.py [key=value ...]\n\n" + data_prep.settings_help())
    cfg, flat = read_config(words)
    torch.set_num_threads(cfg.threads or os.cpu_count())
    device_of(cfg), source_of(cfg.model)  # what is wrong with them is said before any work
    if cfg.mode == "study":
        return data_prep.study(cfg, words)
    if cfg.image and (cfg.mode != "show" or TASKS[cfg.task] is not Points):
        raise UserError('image= needs mode=show task=points and question="..."')
    if cfg.mode == "train":
        profile = "" if cfg.profile == "default" else "-" + cfg.profile
        folder = Path(cfg.runs) / (cfg.run or f"{cfg.task}-{cfg.method}-seed{cfg.seed}{profile}")
        with data_prep.lock(folder):
            return train(cfg, flat, words, folder)
    task = TASKS[cfg.task](cfg)
    name = "-".join(Path(cfg.model).parts[-2:])
    folder = Path(cfg.runs) / (cfg.run or f"{cfg.mode}-{name}")
    if (folder / "settings.yaml").exists():
        raise UserError(f"{folder} holds a training run: give run=ANOTHER_NAME")
    folder.mkdir(parents=True, exist_ok=True)
    data_prep.check_memory(source_of(cfg.model), cfg, device_of(cfg), dtype_of(cfg, device_of(cfg)), task)
    if cfg.mode == "show":  # a few maps are enough to choose from
        cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, maps=min(16, cfg.eval.maps)))
    policy = load_policy(cfg.model, cfg)
    if cfg.image:  # no box is known, so there is nothing to evaluate
        starts = [begin(policy, task, e) for e in task.load("own")]
        chosen = play(policy, task, starts, 1, cfg.eval.max_turns, torch.Generator(policy.device), greedy=True)
    else:
        rows, _, episodes = evaluate(policy, task, cfg, brief=cfg.mode == "show")
        chosen = data_prep.choose(task, episodes)
    if cfg.mode == "show":
        data_prep.film_strip(folder / "episodes.png", task, chosen, cfg.model)
        print(f"wrote {folder / 'episodes.png'}")
    else:
        print(data_prep.table({name: rows}))
        write_file(folder / "results.json", json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])

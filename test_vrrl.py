"""Properties of the program, the method's own first. `pytest -q`: some minutes, no network.

The models are tiny ones with random weights (`policy_of`), or one of them after some SFT steps
(`taught`), so that its conversations have several turns. VRRL_TEST_GPU=1 runs them on a GPU."""
import ast, atexit, contextlib, copy, dataclasses, functools, gc, itertools, json, math, os
import random, re, resource, shlex, shutil, signal, statistics, subprocess, sys, tempfile, time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

GPU = "VRRL_TEST_GPU" in os.environ
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WORLD_SIZE"] = "2"  # as another program may have left it; torchrun sets more
os.environ.pop("RANK", None)
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest, tokenizers, torch, transformers, yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import data_prep, vrrl
sys.path[:0] = [str(vrrl.HERE / "assets"), str(vrrl.HERE / "results")]
import make_embedded, study

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
parametrize = pytest.mark.parametrize
HOME = Path(tempfile.mkdtemp(prefix="test-vrrl-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
BASE = ["device=auto" if GPU else "device=cpu", f"data={HOME / 'data'}"]
BASE += """policy.dtype=float32 make.train=60 make.traces=40 make.test=3 sft.batch=8 rl.questions=8
    rl.samples=4 rl.max_turns=3 eval.max_turns=3 points.moves=no""".split()
CONFIG = yaml.safe_load((vrrl.HERE / "config.yaml").read_text())
TABLE = vrrl.flatten(CONFIG["settings"])
KINDS = ["embedded", "deepstack", "qwen2.5"]
LAKE = {"layout": ["SFF", "FHF", "FFG"]}  # two shortest ways, of four moves, around the hole
BOX = {"id": "box", "size": [96, 96], "box": [40, 40, 56, 56], "within": 0}  # its centre: 12 12

# ==================== Helpers: settings, tasks, models ============================================
class Picture(vrrl.Picture):
    """Remembers its image, so that the library's own processor can be given it."""
    def __init__(self, image, processor):
        super().__init__(image, processor)
        self.image = image
vrrl.Picture = Picture

def rows(text):
    """A table as lists of words: a line is a row, | stands between cells, # before a comment."""
    table = []
    for line in text.strip().splitlines():
        cells = line.partition("#")[0].split("|")
        table.append([cell.strip() for cell in cells])
    return table

def settings(*words):
    return vrrl.read_config([*BASE, *words])[0]

@functools.cache
def made(name, *words):
    return vrrl.TASKS[name](settings(f"task={name}", *words))

def bare(name, *words):
    """A task without data, for given examples."""
    task = object.__new__(vrrl.TASKS[name])
    task.cfg = settings(f"task={name}", *words)
    return task

def qwen25(config, words):
    """A Qwen2.5-VL with the special tokens of another model."""
    special = {key: n for key, n in config.to_dict().items() if key.endswith("token_id") and n}
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2])
    text = dict(
        vocab_size=words + 19, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, initializer_range=0.1)
    vision = dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14,
        out_hidden_size=64, window_size=56, fullatt_block_indexes=[1])
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)

@functools.cache
def folder_of(kind):
    """A Hugging Face folder of a tiny model with random weights."""
    folder = HOME / kind
    model, tokenizer, processor = make_embedded.build(0)
    torch.manual_seed(1)
    if kind == "deepstack":  # deeper visual features, as the released Qwen3-VL has them
        model.config.vision_config.deepstack_visual_indexes = [0]
        model = transformers.Qwen3VLForConditionalGeneration(model.config)
    if kind == "qwen2.5":
        model = qwen25(model.config, len(tokenizer))
        processor = type(processor)(
            size={"shortest_edge": 56 * 56, "longest_edge": 1 << 20}, patch_size=14, merge_size=2,
            image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
        # The template that knows images has a file of its own, as on the hub.
        folder.mkdir()
        template = {"chat_template": tokenizer.chat_template}
        (folder / "chat_template.json").write_text(json.dumps(template))
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder

@functools.cache
def taught():
    """The folder of a model that was shown some demonstrations of grounding, wrong answers too."""
    policy = vrrl.load_policy(folder_of("embedded"), settings("policy.temperature=1"))
    optimizer = vrrl.AdamW(policy)
    task = made("grounding", "sft.multi_share=0.8")
    shown = []
    for number, (example, turns) in enumerate(task.demonstrations()):
        turns = [(taught + context, "") for taught, context in turns]
        shown.append(vrrl.demonstration(policy, task, example, turns, number))
    for step in range(1, 46):
        logps, _ = policy.log_probs(vrrl.batch_of(shown, 12, step, 0))
        loss = -torch.cat(logps).mean()
        loss.backward()
        optimizer.step(4e-3 * min(1, step / 8, (49 - step) / 15))
    policy.save(HOME / "taught")
    return HOME / "taught"

@functools.cache
def policy_of(kind="embedded", *words):
    if kind == "taught":
        return vrrl.load_policy(taught(), settings("policy.temperature=1", *words))
    return vrrl.load_policy(folder_of(kind), settings(*words))

# ==================== Helpers: conversations ======================================================
answer = "<ANSWER>{}</ANSWER>".format
revise = "<THINK>far</THINK><ANSWER>{}</ANSWER>".format
final = "<FINAL>{}</FINAL>".format

def said(short):
    """Texts of turns. "A 0 0; T 9 12; F" is an ANSWER, one after a THINK, and an empty FINAL."""
    texts = []
    for part in short.split("; ") if short else ():
        form = {"A": answer, "T": revise, "F": final}.get(part[0])
        texts.append(form(part[2:]) if form else part)
    return texts

def parsed(task, short):
    """The turns of such texts, without ids."""
    turns, last = [], None
    for text in said(short):
        kind, thought, found = vrrl.parse_turn(task, text, last)
        turns.append(vrrl.Turn([], [], (), kind, thought, found, text))
        last = found or last
    return turns

def scripted(policy, short, number=0):
    """An episode about a training figure in which the policy says this, all of it in the loss."""
    task = made("grounding")
    turns = [(text, "") for text in said(short)]
    return vrrl.demonstration(policy, task, task.examples("train")[number], turns, number)

def ids_of(policy, text):
    return [*policy.encode(text), policy.end_id]

def starts_of(policy, fresh, rolled=0):
    """Starts of grounding: fresh ones, then roll-ins after one or two given answers."""
    task, starts = made("grounding"), []
    spoken = [ids_of(policy, text) for text in said("A 0 24; T 1 1")]
    for n, example in enumerate(task.examples("train")[: fresh + rolled]):
        given = spoken[: 1 + n % 2] if n >= fresh else ()
        starts.append(vrrl.begin(policy, task, example, n, given))
    return starts

def sampled(policy, fresh=5, rolled=2, samples=2, turns=3, **options):
    """Episodes sampled from such starts."""
    starts = starts_of(policy, fresh, rolled)
    names = [str(start.group_id) for start in starts]
    luck = vrrl.uniforms(policy, names, samples, turns)
    return vrrl.play(policy, made("grounding"), starts, samples, turns, luck, **options)

def talkative(monkeypatch):
    """Every turn counts as an answer, so that conversations last until the turn limit."""
    points = itertools.cycle([(0, 24), (3, 4), (20, 9), (24, 0), (12, 12)])
    def read_turn(policy, task, episode, ids, logps=()):
        return vrrl.Turn(ids, [True] * len(ids), logps, "answer", "", next(points))
    monkeypatch.setattr(vrrl, "read_turn", read_turn)

def calls_of(monkeypatch, owner, name):
    """A list that grows by (arguments, result) with each call of a function."""
    calls, function = [], getattr(owner, name)
    def call(*arguments, **options):
        result = function(*arguments, **options)
        calls.append((arguments, result))
        return result
    monkeypatch.setattr(owner, name, call)
    return calls

# ==================== Helpers: numbers and files ==================================================
def library_rows(policy, episode):
    """(log-probs (N, V) of what could have been said, ids (N,) of what was) at each action, from
    one plain forward of the library over all of an episode."""
    (head, first), (rest, later) = episode.opening, episode.rest
    ids = torch.tensor([[*head, *rest]], device=policy.device)
    images = [picture.image for picture in (*first, *later)]
    seen = policy.processor(images=images, return_tensors="pt").to(policy.device)
    kinds = ids.eq(policy.image_id).int()
    out = policy.model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **seen)
    logits = out.logits[0].float() / policy.cfg.policy.temperature
    logp = logits.masked_fill(policy.banned, -torch.inf).log_softmax(-1)
    at = torch.tensor([len(head) + column for column, _ in episode.actions], device=policy.device)
    return logp[at - 1], ids[0, at]

def library_log_probs(policy, episode):
    logp, ids = library_rows(policy, episode)
    return logp.gather(1, ids[:, None])[:, 0]

def furthest(one, other):
    """Largest difference between two tensors, or lists of them, of the same shapes."""
    gaps = []
    for a, b in zip(one, other, strict=True):
        a, b = torch.as_tensor(a).detach().cpu(), torch.as_tensor(b).detach().cpu()
        assert a.shape == b.shape
        gaps.append((a - b).abs().flatten())
    return torch.cat(gaps).max().item()

def gradients(policy):
    """The gradient of each weight that has one; they are cleared."""
    found = {}
    for name, weight in policy.model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad
            weight.grad = None
    return found

def assert_same_gradients(one, other):
    assert one and one.keys() == other.keys()
    most = max(gradient.abs().max().item() for gradient in one.values())
    assert most > 0 and furthest(one.values(), other.values()) < 1e-4 * most

def weights_of(model):
    """A copy of all weights, in one row."""
    return torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])

def leaf(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng).requires_grad_()

def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {file.relative_to(folder): file.read_bytes() for file in files}

def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]

def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]

@pytest.fixture
def fails(capsys):
    """Call a function that must fail as a user's mistake; gives its one line."""
    def call(function, *arguments, **options):
        with pytest.raises(SystemExit) as stop:
            vrrl.run_main(lambda words: function(*arguments, **options), [])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("error: "), line
        return line
    return call

# ==================== The method: loss ============================================================
@parametrize("group, kept", [(2, 1), (3, 1), (2, 2)])
def test_expected_gradient_of_the_loss_is_that_of_the_expected_reward(group, kept):
    """Two turns, all groups of rollouts enumerated; turns before `kept` are masked in each."""
    first, second = leaf(3, seed=1), leaf(3, 2, seed=2)
    rewards = torch.tensor([[1.0, 0.2], [0.0, 0.7], [0.1, 0.4]], dtype=torch.float64)
    logps, value = {}, 0.0
    for path in itertools.product(range(3), range(2)):
        turns = first.log_softmax(0)[path[0]], second.log_softmax(1)[path]
        logps[path] = torch.stack(turns)
        value = value + sum(turns).exp() * rewards[path]
    truth = list(torch.autograd.grad(value, (first, second), retain_graph=True))
    if kept == 2:
        truth[0] = torch.zeros(3)
    mean = 0.0
    for paths in itertools.product(logps, repeat=group):
        spoken = [logps[path] for path in paths]
        chance = sum(spoken).sum().exp().detach()
        paid = torch.stack([rewards[path] for path in paths])
        rollouts = []
        for advantage in vrrl.advantages(paid[None])[0].tolist():
            rollouts.append(SimpleNamespace(advantage=advantage, weights=[float(kept == 1), 1.0]))
        mean = mean - chance * vrrl.policy_loss(rollouts, spoken, group)
    assert furthest(torch.autograd.grad(mean, (first, second)), truth) < 1e-6

def paid_by_chance(task, episode, *settings, **numbers):
    """A reward that rollouts of any model differ in."""
    return sum(episode.rest[0]) % 7 / 10

def loss_by_hand(policy, reference, episodes, cfg):
    """Over plain forwards of the library, rollout by rollout. KL holds on masked turns too."""
    loss = 0.0
    for episode in episodes:
        group = [other.reward for other in episodes if other.group_id == episode.group_id]
        advantage = episode.reward - (sum(group) - episode.reward) / (len(group) - 1)
        if cfg.rl.std_norm:
            advantage /= statistics.stdev(group) + 1e-6
        logp = library_log_probs(policy, episode)
        weights = torch.tensor(episode.weights, device=policy.device)
        loss = loss - advantage * (weights * logp).sum()
        if reference and abs(advantage) > 1e-6:
            gap = library_log_probs(reference, episode).detach() - logp
            loss = loss + cfg.rl.kl * (gap.exp() - gap - 1).sum()
    return loss / len(episodes)

@parametrize("words", [
    "rl.mask=random",
    "rl.mask=expected rl.kl=0.3",
    "rl.mask=none rl.std_norm=yes",
    "policy.freeze_vision=no rl.kl=0.3"])
def test_an_rl_step_takes_the_gradient_of_the_methods_loss(tmp_path, monkeypatch, words):
    cfg = settings(*words.split(), *"""rl.steps=3 rl.questions=6 rl.samples=3 rl.rho=0.2
        policy.micro=5 policy.temperature=1 buffer.correct_share=0""".split())
    policy, reference, taken = vrrl.load_policy(taught(), cfg), None, []
    if cfg.rl.kl:
        reference = policy.reference = vrrl.load_policy(folder_of("embedded"), cfg)
    def step(optimizer, lr):
        taken.append(gradients(policy))
        return 0.0
    monkeypatch.setattr(vrrl.AdamW, "step", step)
    monkeypatch.setattr(vrrl, "reward", paid_by_chance)
    calls = calls_of(monkeypatch, vrrl, "play")
    vrrl.rl(policy, made("grounding"), cfg, vrrl.Run(tmp_path, {}))
    fresh, rolled = [], []
    for (_, episodes), found in zip(calls, taken, strict=True):
        loss_by_hand(policy, reference, episodes, cfg).backward()
        assert_same_gradients(found, gradients(policy))
        rolled += [e for e in episodes if e.given]
        fresh += [e for e in episodes if len(e.turns) > 1 and not e.given]
    weights = {weight for e in fresh for weight in e.weights}
    wanted = {"none": {1.0}, "random": {0.0, 1.0}, "expected": {1 / 3, 1 / 2, 2 / 3, 1.0}}
    assert len(rolled) > 3 and weights == wanted[cfg.rl.mask]

def test_a_step_without_advantages_moves_no_weight_and_is_logged(tmp_path, monkeypatch):
    """Adam's momentum would move the weights even where the gradient is zero."""
    cfg = settings("rl.steps=4", "policy.temperature=1")
    policy, run, seen = vrrl.load_policy(taught(), cfg), vrrl.Run(tmp_path, {}), []
    def reward(task, episode, *settings, **numbers):
        return paid_by_chance(task, episode) if len(seen) < 2 else 0.5
    def log(**figures):
        seen.append((figures.get("skipped"), weights_of(policy.model)))
    monkeypatch.setattr(vrrl, "reward", reward)
    monkeypatch.setattr(run, "log", log)
    vrrl.rl(policy, made("grounding"), cfg, run)
    skipped, (first, second, third, fourth) = zip(*seen)
    assert [flag == 1 for flag in skipped] == [False, False, True, True]
    assert not torch.equal(first, second)
    assert torch.equal(second, third) and torch.equal(second, fourth)

def test_random_masking_drops_the_turns_before_a_uniform_k_and_expected_is_its_average():
    turns = [vrrl.Turn([1] * n, [True] * n) for n in (2, 3, 1, 2)]
    turn_of = [1, 1, 2, 2, 2, 3, 4, 4]  # of each action
    group = [vrrl.Episode({}, [], None, turns=turns)] * 4000
    drawn = Counter(map(tuple, vrrl.turn_weights(group, "random", "seed")))
    assert len(drawn) == 4
    for k in (1, 2, 3, 4):
        assert abs(drawn[tuple(float(t >= k) for t in turn_of)] - 1000) < 130
    (expected,) = vrrl.turn_weights(group[:1], "expected", "seed")
    assert expected == pytest.approx(np.mean([*drawn], 0))
    rollin = vrrl.Episode({}, [], None, given=turns[:1], turns=turns)
    for mask in ("none", "random", "expected"):
        assert vrrl.turn_weights([rollin], mask, "seed") == [[1.0] * 8]

def test_the_baseline_is_the_mean_of_the_others_and_equal_rewards_have_no_advantage():
    rewards = leaf(3, 4).detach()
    found = vrrl.advantages(rewards)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    assert furthest(found, rewards - others) < 1e-12
    scaled = vrrl.advantages(rewards, std_norm=True)
    assert furthest(scaled, found / rewards.std(1, keepdim=True)) < 1e-4
    for n, std_norm in itertools.product(range(100), (False, True)):  # in fp32, as `rl` makes them
        assert vrrl.advantages(torch.full((1, 8), n / 99), std_norm).abs().max() < 1e-6

# ==================== The method: reward ==========================================================
# Progress by hand, s1 = 19.2 and s2 = 48 pixels: "9 12" is 12 pixels from the centre, so that
# p = (e^-0.390625 + e^-0.0625) / 2 = 0.808023; "0 0" is 67.88, p = (e^-12.5 + e^-2) / 2 = 0.067669.
# The gain between them is 0.740354. A wrong episode gets half of 0.1 + 0.9 * 0.740354.
GROUNDING = rows("""
    A 12 12; F                 | 1.0
    A 0 0; F                   | 0.05
    A 0 0; T 9 12; F           | 0.38316
    A 9 12; T 0 0; F           | 0.05
    A 0 0; T 9 12; T 24 24; F  | 0.05
    A 0 0; T 12 12; F          | 0.95
    A 0 0; T 12 12; F          | 0.6 | reward.revision=0.9  # at most 0.4 is taken off
    A 12 12; T 0 0; F          | 0.05
    A 0 0; T 12 12             | 0.0
    A 12 12; so it is; F       | 0.0
""")
# Bonus 0.2, a cost of 0.05 a turn, half weight for what makes it worse, 0.05 off a right answer for
# each revision. Progress: right 1/4, right right 1/2, right right down 3/4, up and left 0.
NAVIGATION = rows("""
    A right right down down; F                    | 1.0
    A up; T right right down down; F              | 1.0    # 0.1 + 0.9 + 0.2 - 0.15 - 0.05
    A right right; T right right down down; F     | 0.95
    A up; T right right down down                 | 0.0
    A right; T right; F                           | 0.0
    A up; T right right down; T left; T right right down down; F | 0.85  # r is clipped at one
    A right; F                                    | 0.0
    A right; T right right down; F                | 0.2    # half of 0.1 + 0.9 * 0.5 - 0.15
    A right right; T left; T right right down; F  | 0.175  # half of 0.1 + 0.9 * 0.5 - 0.2
    A right right down down; T right; F           | 0.0
    A up; T right; F                              | 0.1625 | reward.cost=0
    A right; F                                    | 0.04   | reward.cost=0.01
    A up; T right right down down; F              | 1.3    | reward.bonus=0.5
    A right right; T left; T right right down; F  | 0.1625 | reward.cost=0 | reward.worse=1
    A right right; T left; T right right down; F  | 0.3875 | reward.cost=0 | reward.worse=0
""")

def reward_of(task, short, given=0):
    """The reward of an episode of these turns, of which the first ones are given."""
    turns = parsed(task, short)
    example = LAKE if task.cfg.task == "navigation" else BOX
    episode = vrrl.Episode(example, [], None, given=turns[:given], turns=turns[given:])
    return vrrl.reward(task, episode, **vars(task.cfg.reward))

@parametrize("row", [*GROUNDING, *NAVIGATION], ids=str)
def test_the_reward_is_what_its_docstring_says(row):
    short, expected, *words = row
    name = "grounding" if row in GROUNDING else "navigation"
    for given in range(1 + short.count("; ")):  # given answers count as well
        paid = reward_of(bare(name, *words), short, given)
        assert paid == pytest.approx(float(expected), abs=1e-5)
    right = float(expected) >= 0.6
    assert reward_of(bare(name, "reward.reflection=no"), short) == float(right)

@parametrize("name", ["grounding", "navigation"])
def test_no_wrong_episode_earns_more_than_a_correct_one_and_a_last_step_pays(name):
    task, rng = bare(name), random.Random(0)
    example = LAKE if name == "navigation" else BOX

    def paid(answers, **settings):
        turns = [vrrl.Turn([], [], thought="x" if n else None, answer=answer)
                 for n, answer in enumerate(answers)]
        turns.append(vrrl.Turn([], [], kind="final"))
        return vrrl.reward(task, vrrl.Episode(example, [], None, turns=turns), **settings)

    for _ in range(2000):
        settings = {"reflection": True, "worse": rng.choice([0, 0.5, 1, 10])}
        for key in ("bonus", "cost", "revision"):
            settings[key] = rng.choice([0, 0.05, rng.random(), 1])
        solution = task.solution(example, rng)
        wrong = task.mistakes(example, solution, rng.randint(1, 5), rng)
        mended = paid([*wrong, solution], **settings)
        others = task.mistakes(example, solution, rng.randint(1, 3), rng)
        assert mended > max(paid(wrong, **settings), paid(others, **settings))

@parametrize("short, lost", rows("""
    A 0 0; F                   | never  # or the number of turns after which nothing can mend it
    A 0 0; F 0 0               | never
    A 0 0; T 1 1; T 2 2; F 2 2 | never
                               | 9      # no FINAL so far
    A 0 0                      | 9
    A 0 0; T 1 1               | 9
    F                          | 1
    F 0 0                      | 1
    T 0 0; F                   | 1      # a THINK in turn 1, and none in a revision
    A 0 0; A 1 1; F            | 2
    A 0 0; T 0 0; F            | 2      # repeats
    A 0 0; T 1 1; T 0 0; F     | 3
    A 0 0; F 1 1               | 2      # a FINAL for another answer
    A 0 0; T 1 1; F 0 0        | 3
    A 0 0; <THINK>here</THINK><FINAL></FINAL> | 2
    A 0 0; F; F                | 3
    A 0 0; F; T 1 1            | 3
    A 0 0; so                  | 2
    so; F                      | 1
    A 0 0; <THINK>x</THINK>; F | 2
"""))
def test_well_formed_is_what_the_protocol_says(short, lost):
    task = bare("grounding")
    turns = parsed(task, short)
    whole = vrrl.well_formed(task, turns)
    assert whole == (lost == "never") == (reward_of(task, short) > 0)
    limit = math.inf if lost == "never" else int(lost)
    for n in range(len(turns) + 1):
        assert vrrl.well_formed(task, turns[:n], unfinished=True) == (n < limit)

# ==================== The method: buffer ==========================================================
def test_the_buffer_is_two_queues_first_in_first_out_of_the_settings_sizes():
    buffer, rng = vrrl.Buffer(10, 0.3), random.Random(0)
    for n in range(20):
        buffer.add((n, [], False))
        buffer.add((100 + n, [], True))
        buffer.add((n, [], False))  # one that is there is not added again
    wrong, right = [*range(13, 20)], [117, 118, 119]
    assert [state[0] for state in buffer.wrong] == wrong
    assert [state[0] for state in buffer.correct] == right
    taken = [state[0] for state in (buffer.take(rng) for _ in range(100)) if state]
    assert [n for n in taken if n < 100] == wrong  # each once, in order
    assert [n for n in taken if n >= 100] == right

@parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_roll_ins_start_from_right_states_in_the_share_that_is_set(share):
    buffer, rng = vrrl.Buffer(9000, share), random.Random(0)
    for n in range(4000):
        buffer.add((n, [], n % 2 == 0))
    taken = [buffer.take(rng) for _ in range(2000)]
    verdicts = [state[2] for state in taken if state]
    assert np.mean(verdicts) == pytest.approx(share, abs=0.04)

@parametrize("store, letters, cut, last", rows("""
    drawn     | W F       | 1 | wrong
    drawn     | R F       | 1 | right
    drawn     | W R F     | 1 | wrong
    drawn     | R W R F   | 2 | wrong
    drawn     | W W F     | 1 | wrong
    drawn     | R W       | 1 | right
    drawn     | R bad     | 1 | right
    drawn     | W         | 0 | none
    drawn     | F         | 0 | none
    committed | W F       | 1 | wrong
    committed | R F       | 1 | right
    committed | W R F     | 2 | right
    committed | W W F     | 2 | wrong
    committed | R W       | 0 | none
    committed | W bad     | 0 | none
    committed | W R other | 0 | none
"""))
def test_the_stored_state_is_cut_where_the_policy_had_to_decide(store, letters, cut, last):
    """W and R: a wrong and the right answer; F: a FINAL. The last turn was not shown."""
    task, parts, wrong = made("grounding"), [], iter(["0 24", "24 0", "0 0"])
    example = task.examples("train")[0]
    words = {"F": "F", "bad": "up", "other": "F 5 20", "R": task.say(task.solution(example))}
    for letter in letters.split():
        text = next(wrong) if letter == "W" else words[letter]
        if letter in "WR":
            text = f"T {text}" if parts else f"A {text}"
        parts.append(text)
    episode = scripted(policy_of(), "; ".join(parts))
    spoken = [turn.ids for turn in episode.turns[: int(cut)]]
    expected = (example["id"], spoken, last == "right") if spoken else None
    assert vrrl.state_of(task, episode, store, 0) == expected
    # The same as a roll-in after one given turn leaves a wrong state alone, if it is short.
    given, new = episode.turns[:1], episode.turns[1:]
    rolled = dataclasses.replace(episode, given=given, turns=new)
    of_new = vrrl.state_of(task, dataclasses.replace(rolled, given=[]), store, 0)
    for depth in (0, 1, 2, 3, 4):
        expected = None
        if of_new and not of_new[2] and 1 + len(of_new[1]) <= depth:
            expected = (example["id"], [given[0].ids, *of_new[1]], False)
        assert vrrl.state_of(task, rolled, store, depth) == expected

@parametrize("given, others, again", rows("""
    A 0 0 | T 12 12; F, T 12 12; F | no   # all have mended it
    A 0 0 | T 12 12; F, F          | yes
    A 0 0 | T 12 12; F, T 24 24; F | yes
    A 0 0 | T 12 12; F, so         | yes
    A 12 12 | F, T 24 24; F        | no   # a correct state is taken once
          | A 0 0; F, A 24 24; F   | no   # a question is no state
"""))
def test_a_wrong_state_comes_again_unless_all_its_rollouts_mended_it(given, others, again):
    task, group = bare("grounding"), []
    for other in others.split(", "):
        turns = parsed(task, f"{given}; {other}" if given else other)
        for turn in turns:
            turn.ids = [turn.text]
        count = 1 if given else 0
        group.append(vrrl.Episode(BOX, [], None, given=turns[:count], turns=turns[count:]))
    expected = [(BOX["id"], [[group[0].given[0].text]], False)] if again == "yes" else []
    assert vrrl.states_of(task, group, "drawn", 0) == expected  # no new turn was shown

def test_a_state_starts_with_the_same_ids_and_pictures():
    policy, task, found = policy_of("taught"), made("grounding"), 0
    for e in sampled(policy, fresh=8, rolled=0, samples=4, training=True):
        state = vrrl.state_of(task, e, "drawn", 2)
        if state is None:
            continue
        found += 1
        key, spoken, right = json.loads(json.dumps(state))  # as a checkpoint keeps it
        assert key == e.example["id"]
        start = vrrl.begin(policy, task, e.example, 77, spoken)
        assert start.turns == [] and start.group_id == 77
        assert right == task.exact(e.example, start.answers[-1])
        same = dataclasses.replace(e, given=e.turns[: len(spoken)], turns=[])
        (ids, pictures), (others, shown) = start.opening, same.opening
        assert ids == others and start.answers == same.answers
        assert [p.image for p in pictures] == [p.image for p in shown]
    assert found > 8

# ==================== The method: SFT =============================================================
@parametrize("words", ["grounding", "grounding points.moves=yes", "navigation"])
def test_of_a_demonstration_thoughts_and_right_answers_are_taught_and_wrong_ones_never(words):
    policy, task, lengths = policy_of(), made(*words.split()), Counter()
    for example, turns in task.demonstrations():
        e = vrrl.demonstration(policy, task, example, turns, 0)
        assert vrrl.well_formed(task, e.turns)
        *wrong, last = [task.exact(example, found) for found in e.answers]
        assert last and not any(wrong)
        lengths[len(e.answers)] += 1
        for n, (turn, (taught, context)) in enumerate(zip(e.turns, turns, strict=True)):
            text = taught + context
            think, end, _ = text.rpartition("</THINK>")
            assert taught == (think + end if n < len(wrong) else text)
            ids = ids_of(policy, text)
            count = len(policy.encode(taught)) + (taught == text)  # with the end of the turn
            assert turn.ids == ids
            assert turn.loss_tokens == [True] * count + [False] * (len(ids) - count)
            if 0 < n < len(e.answers):
                before = e.answers[n - 1]
                assert turn.thought.strip() == task.thought(example, before)
                assert task.say(turn.answer, before) in turn.text
        assert (turns[-1][0] == final("")) == (words != "navigation")
    assert lengths[1] == pytest.approx(20, abs=9) and len(lengths) > 3 and max(lengths) <= 5

def test_sft_teaches_first_answers_then_demonstrations_by_mean_log_prob(tmp_path, monkeypatch):
    cfg = settings("sft.first_steps=6", "sft.steps=6", "sft.lr=0.004", "policy.micro=5")
    task, policy = made("grounding"), vrrl.load_policy(folder_of("embedded"), cfg)
    calls = calls_of(monkeypatch, policy, "log_probs")
    vrrl.sft(policy, task, cfg, vrrl.Run(tmp_path, {}))
    lines = lines_of(tmp_path)
    stages = [(line["stage"], line["step"]) for line in lines]
    assert stages == [*itertools.product(("first", "sft"), range(1, 7))]
    for n, line in enumerate(lines):  # a batch of 8 is two micro-batches
        logps = [torch.cat(logps) for _, (logps, _) in calls[2 * n : 2 * n + 2]]
        assert line["loss"] == pytest.approx(-torch.cat(logps).mean().item(), abs=1e-4)
    batches = [episodes for (episodes,), _ in calls]
    for e in sum(batches[:12], []):
        (turn,) = e.turns
        assert turn.kind == "answer" and turn.thought is None and all(turn.loss_tokens)
        assert task.exact(e.example, turn.answer)
    assert {len(e.turns) for e in sum(batches[12:], [])} >= {2, 3}
    assert lines[5]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[5]["lr"] == pytest.approx(0.0004)

def test_demonstrations_too_large_to_be_kept_are_made_again_the_same(tmp_path, monkeypatch):
    cfg, task = settings(), made("grounding", "sft.multi_share=0.8")
    data, logs = task.demonstrations()[:10], []
    calls = calls_of(monkeypatch, vrrl, "demonstration")
    pixels = 10 * 96 * 96
    for kept, count in ((pixels + 1, 10), (pixels, 24)):  # of three batches of eight
        monkeypatch.setattr(vrrl, "KEPT", kept)
        run, policy = vrrl.Run(tmp_path / str(kept), {}), vrrl.load_policy(taught(), cfg)
        calls.clear()
        vrrl.sft_stage("sft", 3, data, policy, task, cfg, run)
        assert len(calls) == count
        logs.append(untimed(run.folder))
    for line, other in zip(*logs, strict=True):
        assert line == pytest.approx(other, abs=1e-4)

@parametrize("kind", KINDS)
def test_adapters_train_alone_and_are_merged_on_save(kind, tmp_path):
    policy, plain = policy_of(kind, "policy.lora=4"), policy_of(kind)
    episodes, optimizer = [scripted(plain, "A 0 24; T 9 9; F")], vrrl.AdamW(policy)
    def log_probs(policy):
        return torch.cat(policy.log_probs(episodes)[0])
    for _ in range(3):
        loss = -log_probs(policy).sum()
        loss.backward()
        optimizer.step(0.02)
    assert sum(p.numel() for p in optimizer.weights) < 0.2 * len(weights_of(plain.model))
    trained = log_probs(policy)
    with policy.without_adapters():  # the model of the KL term
        off = log_probs(policy)
    assert furthest(off, log_probs(plain)) < 1e-5 and furthest(trained, off) > 0.1
    policy.save(tmp_path / "merged")
    again = vrrl.load_policy(tmp_path / "merged", settings())
    assert furthest(trained, log_probs(again)) < 1e-4

def test_every_pass_over_the_items_is_whole_and_in_a_new_order():
    taken = []
    for step in range(1, 9):
        taken += vrrl.batch_of("abcdefgh", 3, step, 0)
    passes = {"".join(taken[at : at + 8]) for at in (0, 8, 16)}
    assert len(passes) == 3
    assert all(sorted(one) == [*"abcdefgh"] for one in passes)

# ==================== Policy ======================================================================
@parametrize("kind", ["taught", *KINDS])
def test_log_probs_of_sampling_and_training_are_the_librarys(kind, monkeypatch):
    """Of the policy's own tokens alone: no given turn and no feedback. Their entropies too; and
    greedy play says what is likeliest."""
    policy = policy_of(kind)
    if kind != "taught":
        talkative(monkeypatch)
    episodes = sampled(policy)
    assert max(len(e.turns) for e in episodes) == 3 and any(e.given for e in episodes)
    episodes[0].turns[0].loss_tokens[0] = False  # as what a demonstration does not teach
    recorded, truth, spread = [], [], []
    for e in episodes:
        chosen, chances = [], []
        for turn in e.turns:
            chosen += itertools.compress(turn.ids, turn.loss_tokens)
            chances += itertools.compress(turn.logps, turn.loss_tokens)
        recorded.append(chances)
        logp, ids = library_rows(policy, e)
        assert ids.tolist() == chosen
        truth.append(logp[range(len(ids)), ids])
        known = logp[:, ~policy.banned]
        spread.append(-(known.exp() * known).sum(-1))
    logps, entropies = policy.log_probs(episodes)
    assert furthest(logps, recorded) < 2e-4
    assert furthest(logps, truth) < 1e-4
    assert furthest(entropies, spread) < 1e-3
    for e in vrrl.play(policy, made("grounding"), starts_of(policy, 3), 1, 3):
        logp, ids = library_rows(policy, e)
        assert torch.equal(logp.argmax(-1), ids)

@torch.no_grad()
@parametrize("kind", KINDS)
def test_features_of_mixed_pictures_equal_the_librarys_of_each(kind):
    policy, rng, images = policy_of(kind), np.random.default_rng(0), []
    for size in ((96, 96), (61, 90), (300, 33), (96, 160), (96, 96)):
        images.append(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)))
    pictures = [vrrl.Picture(image, policy.processor) for image in images]
    found = policy.encode_pictures([*pictures, pictures[0]])
    for image, (tokens, deep) in zip([*images, images[0]], found, strict=True):
        seen = policy.processor(images=image, return_tensors="pt").to(policy.device)
        out = policy.model.model.get_image_features(*seen.values(), return_dict=True)
        levels = []
        for level in getattr(out, "deepstack_features", None) or ():
            levels.append(level if torch.is_tensor(level) else level[0])
        assert len(levels) == (kind == "deepstack")
        assert furthest([tokens, *deep], [out.pooler_output[0], *levels]) < 1e-5

def test_only_plain_tokens_and_the_end_of_a_turn_are_sampled():
    policy = policy_of("qwen2.5", "policy.temperature=10")
    special = policy.encode("<|image_pad|> <|video_pad|> <|im_start|> <|endoftext|>")
    banned = [*special, *range(len(policy.tokenizer), len(policy.banned))]
    assert len(banned) == 4 + 19
    words = [policy.end_id, *policy.encode("".join(vrrl.TAGS))]
    logp = policy.log_softmax(torch.randn(3, 64, device=policy.device))
    assert torch.isneginf(logp[:, banned]).all() and torch.isfinite(logp[:, words]).all()

@torch.no_grad()
def test_sampled_tokens_follow_their_probabilities():
    policy, count = policy_of("embedded", "policy.temperature=3", "policy.max_new=4"), 400
    context = vrrl.Context(1, policy.device)
    policy.read(context, [starts_of(policy, 1)[0].opening])
    chance = policy.log_softmax(context.last)[0].exp()
    context.take([0] * count)
    luck = torch.full((count, 4), 0.5, dtype=torch.float64, device=policy.device)
    luck[:, 0] = torch.arange(count) / count
    drawn = Counter(ids[0] for ids, _ in policy.sample(context, luck))
    assert len(drawn) > 9
    assert not policy.banned[[*drawn]].any()  # not even where the number is 0
    for token, p in enumerate(chance.tolist()):
        assert abs(drawn[token] - p * count) < 1.01

def test_a_rollout_depends_neither_on_its_neighbours_nor_on_their_order():
    def played(order, *words):
        policy = policy_of("taught", *words)
        starts = starts_of(policy, 3, 2)
        starts = [starts[n] for n in order]
        luck = vrrl.uniforms(policy, [str(n) for n in order], 2, 3)
        found = vrrl.play(policy, made("grounding"), starts, 2, 3, luck)
        return {(e.group_id, n % 2): [turn.ids for turn in e.turns] for n, e in enumerate(found)}

    whole = played(range(5))
    assert whole[0, 0] != whole[0, 1]
    assert played([4, 2, 0, 3, 1]) == whole
    assert played(range(5), "policy.rows=3") == whole
    assert played([2]) == {key: whole[key] for key in ((2, 0), (2, 1))}

@parametrize("temperature, least, most", [(0.05, 5, 9), (1, 6, 19), (10, 20, 20)])
def test_equal_rollouts_share_rows_and_nothing_else_changes(temperature, least, most, monkeypatch):
    """At a low temperature nearly all of the 20 rollouts are equal, at a high one none are."""
    policy = policy_of("taught", f"policy.temperature={temperature}")
    def play():
        episodes = sampled(policy, 3, 2, 4)
        found = policy.log_probs(episodes)
        loss = sum((n + 1) * logp.sum() for n, logp in enumerate(found[0]))
        loss.backward()
        return episodes, *found, gradients(policy)

    together, logps, entropies, shared = play()
    distinct = {(e.group_id, *e.rest[0]) for e in together}
    assert least <= len(distinct) <= most
    group, number = vrrl.Context.group, itertools.count()
    def apart(context, keys):  # every conversation has a row of its own
        keys = [(row, (said, next(number))) for row, said in keys]
        return [(row, said) for row, (said, _) in group(context, keys)]
    monkeypatch.setattr(vrrl.Context, "group", apart)
    alone, logps_alone, entropies_alone, unshared = play()
    for one, other in zip(together, alone, strict=True):
        assert [turn.ids for turn in one.turns] == [turn.ids for turn in other.turns]
    assert furthest(logps, logps_alone) < 1e-4 and furthest(entropies, entropies_alone) < 1e-3
    assert_same_gradients(shared, unshared)

def test_training_play_ends_where_the_reward_is_lost_and_every_answer_is_shown(monkeypatch):
    policy, task = policy_of(), made("grounding")
    (begun,) = starts_of(policy, 1)
    texts = itertools.cycle(["A 0 0", "A 1 1"])  # the second answer has no THINK
    monkeypatch.setattr(vrrl, "read_turn", lambda *any: parsed(task, next(texts))[0])
    (episode,) = vrrl.play(policy, task, [begun], 1, 4, training=True)
    assert len(episode.turns) == 2 and not begun.turns
    (episode,) = vrrl.play(policy, task, [begun], 1, 4)
    *shown, last = episode.turns
    assert len(shown) == 3 and last.picture is None
    for turn in shown:
        assert turn.picture.image == task.feedback(begun.example, turn.answer)

@parametrize("frozen", ["yes", "no"])
@parametrize("kind", KINDS)
def test_checkpointing_and_shared_openings_change_no_gradient(kind, frozen, monkeypatch):
    def gradients_of(policy, episodes):
        logps, _ = policy.log_probs(episodes)
        loss = sum((n + 1) * logp.sum() for n, logp in enumerate(logps))
        loss.backward()
        return gradients(policy)

    words = f"policy.freeze_vision={frozen}"
    policy, runs = policy_of(kind, words), Counter()
    talkative(monkeypatch)
    episodes = sampled(policy, 2, 2, 2, 2)
    plain = gradients_of(policy, episodes)
    assert any("visual" in name for name in plain) == (frozen == "no")
    apart = [dataclasses.replace(e, group_id=n) for n, e in enumerate(episodes)]
    assert_same_gradients(plain, gradients_of(policy, apart))
    monkeypatch.setattr(vrrl, "is_large", lambda model: True)
    large = vrrl.load_policy(folder_of(kind), settings(words))
    for layer in large.model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, *any: runs.update([module]))
    assert_same_gradients(plain, gradients_of(large, episodes))
    assert max(runs.values()) == 4  # opening and rest, forwards and once more

@parametrize("large", [False, True])
@parametrize("lora", [0, 4])
def test_a_policy_that_is_dropped_frees_its_weights_at_once(lora, large, monkeypatch):
    """Two models would not fit; the collector of cycles knows nothing of a GPU's memory."""
    monkeypatch.setattr(vrrl, "is_large", lambda model: large)
    gc.disable()
    try:
        policy = vrrl.load_policy(folder_of("embedded"), settings(f"policy.lora={lora}"))
        logps, _ = policy.log_probs([scripted(policy, "A 0 24; F")])
        logps[0].sum().backward()
        weight = weakref.ref(next(policy.model.parameters()))
        del policy, logps
        assert weight() is None
    finally:
        gc.enable()

@parametrize("system", ["", "find the path"])
@parametrize("kind", KINDS)
def test_a_conversation_has_the_ids_of_the_chat_template(kind, system):
    def words(text):
        return {"type": "text", "text": text}

    policy, task = policy_of(kind, f"policy.system={system}"), made("grounding")
    image = {"type": "image"}
    for number, short in enumerate(("A 3 4; F", "A 3 4; T 24 0; F", "F")):
        e = scripted(policy, short, number)
        question, reply = task.question(e.example)
        talk, asked = [], [words(question), image]
        if system:
            talk.append({"role": "system", "content": [words(system)]})
        for turn in e.turns:
            talk.append({"role": "user", "content": asked})
            talk.append({"role": "assistant", "content": [words(turn.text)]})
            asked = [image, words(reply)]
        text = policy.tokenizer.apply_chat_template(talk, tokenize=False)
        (head, first), (rest, later) = e.opening, e.rest
        for picture in (*first, *later):
            text = text.replace("<|image_pad|>", "\0" * math.prod(picture.grid), 1)
        text = text.replace("\0", "<|image_pad|>")
        assert [*head, *rest] == policy.tokenizer.encode(text, add_special_tokens=False)

def test_tags_are_encoded_apart_and_a_turn_that_was_cut_off_is_bad():
    (episode,) = starts_of(policy_of(), 1)
    ids = policy_of().encode(answer("1 2"))
    assert vrrl.read_turn(policy_of(), made("grounding"), episode, ids).kind == "bad"
    one_token = SimpleNamespace(encode=lambda text, **options: [text])
    policy = SimpleNamespace(tokenizer=one_token)
    assert vrrl.Policy.encode(policy, "<THINK>a>b</THINK>") == ["<THINK>", "a>b", "</THINK>"]

# ==================== AdamW =======================================================================
def stepped(module, ours, rates, scale=1.0):
    """The weights after a step of our AdamW, or of torch's, at each rate; the gradient is
    scale * (1 + half a random number)."""
    rng, module = torch.Generator().manual_seed(0), copy.deepcopy(module)
    weights = [*module.parameters()]
    optimizer = vrrl.AdamW(SimpleNamespace(model=module))
    torchs = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    for rate in rates:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=rng)
            weight.grad = (scale * (1 + noise / 2)).to(weight.dtype)
        if ours:
            optimizer.step(rate)
        else:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            torchs.param_groups[0]["lr"] = rate
            torchs.step()
    return weights_of(module)

@parametrize("scale", [0.001, 3.0], ids=["below the clip", "clipped"])
def test_adamw_equals_torchs_in_fp32(scale):
    module, rates = torch.nn.Linear(9, 7), [0.001, 0.002, 0.003] * 7
    ours = stepped(module, True, rates, scale)
    assert furthest(ours, stepped(module, False, rates, scale)) < 1e-6
    assert furthest(ours, weights_of(module)) > 1e-2

def test_in_bf16_updates_too_small_for_it_add_up_as_in_fp32():
    torch.manual_seed(0)
    module, rates = torch.nn.Linear(64, 64, bias=False).bfloat16(), [1e-5] * 300
    start = weights_of(module).float()
    ours = (stepped(module, True, rates) - start).mean().item()
    plain = (stepped(module, False, rates) - start).mean().item()
    true = (stepped(module.float(), True, rates) - start).mean().item()
    assert abs(plain) < 0.2 * abs(true)  # rounded away
    assert ours == pytest.approx(true, rel=0.1)

def test_a_step_that_is_not_finite_changes_nothing():
    module = torch.nn.Linear(3, 2)
    optimizer, before = vrrl.AdamW(SimpleNamespace(model=module)), weights_of(module)
    loss = module(torch.ones(3)).sum() * math.nan
    loss.backward()
    assert not math.isfinite(optimizer.step(0.1))
    assert torch.equal(weights_of(module), before)

# ==================== Tasks: pointing =============================================================
@parametrize("text, verdict, near, thought", rows("""
    12 12 | right | 1.0      | here
    10 10 | right | 0.826304 | right 2 down 2
    14 12 | wrong | 0.906614 | left 2
    12 14 | wrong | 0.906614 | up 2
    7 13  | wrong | 0.579167 | right 5 up 1
    6 12  | wrong | 0.494206 | far
"""))
def test_pointing_by_hand(text, verdict, near, thought):
    """The box 40..56 has its centre at 48; an answer stands for 4 pixels, a crop has 48."""
    task = bare("grounding")
    x, y = task.parse(text)
    assert task.exact(BOX, (x, y)) == (verdict == "right")
    assert task.progress(BOX, (x, y)) == pytest.approx(float(near), abs=1e-6)
    assert task.thought(BOX, (x, y)) == thought
    assert task.pixel(BOX, (x, y)) == (4 * x, 4 * y)

@parametrize("text, kind", [("306 407", "repetition"), ("306 408", "answer")])
def test_a_point_nearer_than_a_hundredth_of_the_scale_is_a_repetition(text, kind):
    task = bare("grounding", "points.scale=1000")
    turns = parsed(task, f"A 300 400; T {text}; F")
    assert vrrl.well_formed(task, turns) == (kind == "answer")

@parametrize("within, x, verdict", rows("""
    0  | 249 | wrong
    0  | 250 | right
    0  | 349 | right
    0  | 350 | wrong
    40 | 190 | wrong
    40 | 210 | right
    40 | 390 | right
    40 | 410 | wrong
"""))
def test_a_point_is_right_inside_the_box_or_within_so_many_pixels_of_its_centre(within, x, verdict):
    task = bare("grounding", "points.scale=1000")
    example = {"size": [400, 300], "box": [100, 100, 140, 120], "within": int(within)}
    assert task.exact(example, (int(x), 367)) == (verdict == "right")
    assert task.pixel(example, (500, 500)) == (200, 150) and task.solution(example) == (300, 367)

def test_progress_in_pointing_has_the_papers_widths():
    """s1 = 80 and s2 = 200 pixels for its crops of 200; the centre is 80 pixels away."""
    task = bare("grounding", "points.scale=100", "points.crop=200")
    expected = (math.exp(-1) + math.exp(-0.16)) / 2
    example = {"size": [100, 100], "box": [0, 0, 20, 20]}
    assert task.progress(example, (90, 10)) == pytest.approx(expected)

def test_half_the_wrong_points_lie_near_the_target_on_purpose():
    task, rng = bare("grounding"), random.Random(0)
    far = [task.thought(BOX, task.mistake(BOX, rng)) == "far" for _ in range(400)]
    assert 0.2 < np.mean(far) < 0.55

def test_with_scale_0_an_answer_is_a_pixel_of_the_picture_as_the_model_sees_it():
    task = bare("grounding", "points.scale=0", f"model={folder_of('qwen2.5')}")
    example = {"size": [96, 150], "box": [48, 75, 60, 90], "within": 0}
    picture = vrrl.Picture(Image.new("RGB", (96, 150)), policy_of("qwen2.5").processor)
    down, across = picture.grid
    assert task.ends(example) == (28 * across, 28 * down) == (84, 140) == task.parse("84 140")
    assert task.pixel(example, (42, 70)) == (48, 75)
    assert task.exact(example, task.solution(example))

@parametrize("kind, scale", [("embedded", 1000), ("qwen2.5", 0)])
def test_with_max_pixels_a_photo_is_seen_small_and_its_crops_are_cut_from_it_whole(
        kind, scale, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 100, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    words = f"model={folder_of(kind)}", "policy.max_pixels=20000", f"points.scale={scale}"
    task, policy = bare("points", *words), vrrl.load_policy(folder_of(kind), settings(*words))
    task.folder = tmp_path
    photo = {"image": "photo.png", "question": "find", "within": 0, "size": [400, 300],
             "box": [160, 180, 240, 220]}
    start = vrrl.begin(policy, task, photo)
    _, down, across = start.question_picture.patch_grid
    side = policy.processor.patch_size
    assert 12_000 < down * across * side ** 2 <= 20_000
    assert start.question_ids.count(policy.image_id) == down * across / 4
    assert task.ends(photo) == ((1000, 1000) if scale else (across * side, down * side))
    answer = task.solution(photo)
    x, y = map(round, task.pixel(photo, answer))
    assert task.exact(photo, answer) and math.dist((x, y), (200, 200)) < 3
    crop = np.asarray(task.feedback(photo, answer))
    assert (crop[:12] == pixels[y - 24 : y - 12, x - 24 : x + 24]).all()  # a pixel is a pixel
    policy.save(tmp_path / "saved")  # a saved model keeps to it
    again = vrrl.load_policy(tmp_path / "saved", settings())
    assert vrrl.begin(again, task, photo).question_ids == start.question_ids

def test_a_crop_shows_its_point_in_the_centre_of_a_ring_and_grey_beyond_the_edge():
    pixels = np.random.default_rng(0).integers(0, 100, (60, 90, 3), dtype=np.uint8)
    page = np.pad(pixels, ((24, 24), (24, 24), (0, 0)), constant_values=128)
    for x, y in ((45, 30), (0, 0), (90, 58)):
        crop = data_prep.draw_crop(Image.fromarray(pixels), (x, y), 48)
        ring = (np.asarray(crop) != page[y : y + 48, x : x + 48]).any(-1)
        rows, columns = np.nonzero(ring)
        assert len(rows) > 8 and np.abs(np.hypot(rows - 24, columns - 24) - 3).max() < 1

# ==================== Tasks: navigation ===========================================================
@parametrize("moves, outcome, progress", rows("""
    right right down down            | exact  | 1
    right left right right down down | longer | 0.25
    right right down down up down    | past   | 0
    right right down down down       | edge   | 0
    up right right down down         | edge   | 0
    right down down right            | hole   | 0.25
    right right down                 | short  | 0.75
"""))
def test_a_walk_by_hand(moves, outcome, progress):
    task = bare("navigation")
    way = task.parse(f" {moves.replace(' ', ', ').upper()}\n")
    assert way == tuple(moves.split())
    assert task.exact(LAKE, way) == (outcome == "exact")
    assert outcome == "exact" or task.thought(LAKE, way) == outcome
    assert task.progress(LAKE, way) == float(progress)

STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

def cells_of(layout, kinds):
    """The cells (row, column) of these kinds."""
    cells = set()
    for row, letters in enumerate(layout):
        cells |= {(row, column) for column, kind in enumerate(letters) if kind in kinds}
    return cells

def start_of(layout):
    return cells_of(layout, "S").pop()

def least(layout):
    """{cell: least moves to the goal} of the cells with a way: a search of its own."""
    free, edge, far = cells_of(layout, "SFG"), cells_of(layout, "G"), {}
    for moves in range(len(free)):
        far |= dict.fromkeys(edge, moves)
        ways = itertools.product(edge, STEPS.values())
        beside = {(row + down, column + right) for (row, column), (down, right) in ways}
        edge = beside & free - far.keys()
    return far

def test_walks_agree_with_a_search_of_its_own():
    task, rng, outcomes = bare("navigation"), random.Random(0), Counter()
    for example in made("navigation").examples("train") * 20:
        wider = "F" * rng.randrange(3)  # no map that is made has sides of two lengths
        example = {"layout": [row + wider for row in example["layout"]]}
        far, (row, column) = least(example["layout"]), start_of(example["layout"])
        shortest = task.solution(example, rng)
        stray = tuple(rng.choices([*STEPS], k=rng.randint(1, 7)))
        ways = [shortest, shortest + stray[:2], shortest[:-1] + stray[:2], stray]
        way, length, good = rng.choice(ways), far[row, column], 0
        for move in way:
            row, column = row + STEPS[move][0], column + STEPS[move][1]
            if far.get((row, column)) != length - good - 1:
                break
            good += 1
        progress = 0 if good == length < len(way) else good / length
        assert task.progress(example, way) == pytest.approx(progress), (example, way)
        assert task.exact(example, way) == (good == length == len(way)), (example, way)
        wrong = task.mistake(example, rng)
        assert wrong and not task.exact(example, wrong)
        kind = "exact" if task.exact(example, way) else task.thought(example, way)
        outcomes[kind] += 1
    assert all(outcomes[kind] > 20 for kind in ("exact", "edge", "hole", "past", "short"))

# ==================== Tasks: parsing ==============================================================
@parametrize("text, kind, thought, found", rows(r"""
    <ANSWER> 3,14\n</ANSWER>                  | answer | None    | 3 14
    <ANSWER>( 3, 14 )</ANSWER>                | answer | None    | 3 14
    <THINK></THINK><ANSWER>1 2</ANSWER>       | answer |         | 1 2
    <THINK>far</THINK> <ANSWER>0 24</ANSWER>  | answer | far     | 0 24
    <FINAL> \n</FINAL>                        | final  | None    | None
    <THINK>a\nb < c</THINK><FINAL>1 2</FINAL> | final  | a\nb < c | None
"""))
def test_a_turn_is_parsed_as_the_protocol_says(text, kind, thought, found):
    task, turn = bare("grounding"), text.replace(r"\n", "\n")
    parts = vrrl.parse_turn(task, turn, (1, 2))
    shown = parts[0], str(parts[1]).replace("\n", r"\n"), str(parts[2] and task.say(parts[2]))
    assert shown == (kind, thought, found)
    assert vrrl.parse_turn(task, final(""))[0] == "bad"  # there is no answer yet

BAD = """
3 4
<ANSWER>3 4
3 4</ANSWER>
<ANSWER>3 4</FINAL>
<ANSWER>3 4</ANSWER><FINAL></FINAL>
<ANSWER>3 4</ANSWER><ANSWER>3 4</ANSWER>
<ANSWER><ANSWER>3 4</ANSWER></ANSWER>
<THINK>x</THINK>
<THINK>x<ANSWER>3 4</ANSWER>
<THINK>x</THINK><THINK>x</THINK><ANSWER>3 4</ANSWER>
<THINK><ANSWER>3 4</ANSWER></THINK><ANSWER>3 4</ANSWER>
<ANSWER>3 4</ANSWER> done
so <ANSWER>3 4</ANSWER>
<answer>3 4</answer>
<ANSWER></ANSWER>
<ANSWER>3</ANSWER>
<ANSWER>3 4 5</ANSWER>
<ANSWER>-3 4</ANSWER>
<ANSWER>3.5 4</ANSWER>
<ANSWER>٣ 4</ANSWER>
<ANSWER>25 3</ANSWER>
<ANSWER>3 25</ANSWER>
<ANSWER>1 2 up</ANSWER>
<FINAL>2 1</FINAL>
"""
@parametrize("text", [*BAD.splitlines(), answer("9" * 400 + " 1")])
def test_what_the_protocol_does_not_know_is_bad(text):
    kind, _, found = vrrl.parse_turn(bare("grounding"), text, (1, 2))
    assert kind == "bad" and found is None

@parametrize("text", ["", " , ", "north", "up1", "up;left", "٣ up"])
def test_what_is_not_moves_is_no_answer_of_navigation(text):
    assert bare("navigation").parse(text) is None

@parametrize("text, there", rows("""
    left 3 up 1 | 3 14
    down 9      | 6 24
    right 18    | 24 15
    left 7      | bad
    up          | bad
    down 10     | bad
    9 6         | bad
    3 left      | bad
    left 3 up   | bad
    left -3     | bad
"""))
def test_with_moves_a_revised_answer_starts_at_the_last_one(text, there):
    task = bare("grounding", "points.moves=yes")
    kind, _, found = vrrl.parse_turn(task, answer(text), (6, 15))
    assert (task.say(found) if kind == "answer" else kind) == there
    assert (task.parse(text) is None) == (text != "9 6")  # as a first answer

@parametrize("name", ["grounding", "navigation"])
def test_no_text_breaks_the_parser_nor_has_nested_tags_accepted(name):
    rng, task, kinds = random.Random(0), bare(name), Counter()
    words = "3 4|12 12|up|left, down|٣|½|\u2028|\ue000|\0|😀|/>|-1|1e3|\n| |<THINK|</|<|<FINAL/>"
    words = [*words.split("|"), "", "9" * 50]
    forms = ["THINK ANSWER", "ANSWER", "FINAL", "THINK FINAL"]
    for number in range(3000):
        parts = rng.choices(words + vrrl.TAGS, k=rng.randint(0, 12))
        if number % 2:  # near the protocol: such a turn, half the time with one part more
            parts = []
            for tag in rng.choice(forms).split():
                parts += [f"<{tag}>", rng.choice(words), f"</{tag}>"]
            parts.insert(rng.randrange(9), rng.choice(["", rng.choice(words + vrrl.TAGS)]))
        kind, thought, found = vrrl.parse_turn(task, "".join(parts), task.parse("3 4") or ("up",))
        kinds[kind] += 1
        assert (found is None) == (kind != "answer")
        if kind != "bad":
            tags = re.findall("|".join(vrrl.TAGS), "".join(parts))
            before = ["<THINK>", "</THINK>"] if thought is not None else []
            assert tags == [*before, f"<{kind.upper()}>", f"</{kind.upper()}>"]
    assert min(kinds["answer"], kinds["final"], kinds["bad"]) > 20

@parametrize("text", [
    "<THINK>" * 5000,
    "<ANSWER>" + "up " * 50_000,
    "<THINK>" * 2000 + "</THINK>" * 2000,
    "<" * 50_000,
    "<THINK>x</THINK>" + " " * 4000 + "x",
    answer("up," * 50_000 + "x"),
    answer(" " * 700 + "1" + " " * 700 + "x"),
    answer("up") + " " * 4000 + "x"], ids=range(8))
def test_pathological_turns_are_parsed_quickly(text):
    began = time.process_time()
    for name in ("grounding", "navigation"):
        vrrl.parse_turn(bare(name), text)
    assert time.process_time() - began < 0.5

# ==================== Data ========================================================================
def all_examples(task):
    parts = itertools.product(("test", "dev"), task.splits)
    names = ["train", *map("_".join, parts)]
    return [example for name in names for example in task.examples(name)]

@parametrize("kind", ["embedded", "text"])
def test_figures_hold_their_target_and_are_made_again_the_same(kind, tmp_path):
    words = f"points.kind={kind}", "make.train=9", "make.test=2"
    task = made("grounding", *words)
    again = vrrl.Grounding(settings(*words, f"data={tmp_path}"))
    assert contents(task.folder) == contents(again.folder)
    for example in all_examples(task):
        image, (x0, y0, x1, y1) = task.image(example), example["box"]
        assert [*image.size] == example["size"]
        assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
        if kind == "embedded":
            assert task.exact(example, task.solution(example))
            # Red is in the box alone, and fills at least half of it; look-alikes are in no picture
            # of the distribution that is trained.
            far = np.linalg.norm(np.asarray(image, float) - data_prep.RED, axis=-1)
            red = far == 0
            assert red[y0:y1, x0:x1].sum() == red.sum() > 0.5 * (x1 - x0) * (y1 - y0)
            alike = ((far >= 70) & (far <= 110)).any()
            assert alike == (not example["id"].startswith(("train", "test_id", "dev_id")))

def test_images_that_are_kept_take_at_most_2_gigabytes():
    """Of the largest that are taken, see test_an_image_that_is_huge."""
    assert data_prep.cached_image.cache_info().maxsize * 4096 * 4096 * 3 < 2.1e9

def test_no_picture_is_in_two_places(tmp_path):
    def paint(rng):  # of just twelve
        return {}, Image.new("L", (8, 8), rng.randrange(12))
    data_prep.make_folder(tmp_path / "x", "x", {"train": [()] * 9, "test_id": [()] * 3}, paint)
    assert len({p.read_bytes() for p in (tmp_path / "x" / "images").iterdir()}) == 12

def test_maps_are_solvable_and_no_layout_is_in_two_places():
    layouts = [example["layout"] for example in all_examples(made("navigation"))]
    assert all(start_of(layout) in least(layout) for layout in layouts)
    assert len(set(map(tuple, layouts))) == len(layouts) == 60 + 6 * 3

def test_two_ways_on_a_map_are_never_drawn_alike():
    task, drawn = made("navigation"), []
    example = next(e for e in task.examples("train") if len(e["layout"]) == 5)
    inside = cells_of(example["layout"], "SFGH")
    for length in (1, 2, 3):
        for moves in itertools.product(STEPS, repeat=length):
            steps = [start_of(example["layout"]), *(STEPS[move] for move in moves)]
            if inside.issuperset(map(tuple, np.cumsum(steps, 0))):
                drawn.append(task.feedback(example, moves).tobytes())
    assert len(set(drawn)) == len(drawn) > 15

def test_the_shipped_model_has_all_words_of_its_tasks():
    policy = vrrl.load_policy("assets/embedded", settings())
    for name in ("grounding", "navigation"):
        texts = ["far here edge hole past short longer"]
        for example in made(name).examples("test_id"):
            texts += made(name).question(example)
        assert policy.tokenizer.unk_token_id not in policy.encode(" ".join(texts))

# ==================== Evaluation ==================================================================
def test_figures_of_an_evaluation_by_hand():
    task, outcomes = made("grounding"), []
    right = task.say(task.solution(task.examples("train")[0]))
    for short in ("A R; F", "A 0 24; T R; F", "A 0 24", "A R; T 0 24; F", "A 24 0; T 0 24; F"):
        e = scripted(policy_of(), short.replace("R", right))
        if short[:4] == "A 24":  # a roll-in
            e = dataclasses.replace(e, given=e.turns[:1], turns=e.turns[1:])
        outcomes.append(vrrl.outcome(task, e))
    found = vrrl.rates(outcomes[:4], 2)
    both = {"first": 0.5, "final": 0.5, "commit": 0.75, "turns": 2.25}
    assert found == found | both | {"repair_own": 0.5, "break": 0.5, "after_turn": [0.5, 0.5]}
    assert found["first_by_question"] == "1001"
    health = vrrl.health(outcomes)  # of two wrong answers that were shown, one was committed
    assert health == health | both | {"rollins": 0.2, "rollin_repair": 0, "commit_wrong": 0.5}
    row = found | {"split": "far", "ood": True, "repair_fixed": None}
    columns = ["first", "final", "repair_own", "repair_fixed", "break", "commit"]
    lines = data_prep.table({"m": [row, row | {"final": 0.2}]}, columns)
    assert "| m | far | 4 | 50.0 | 50.0 | 50.0 | - | 50.0 | 75.0 | 2.25 |" in lines
    assert "ood** | 8 | 50.0 | 35.0 |" in lines

def test_a_chart_of_a_figure_that_the_log_lacks_is_an_error(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"stage": "rl", "step": 1, "loss": 0.5}\n')
    data_prep.curves(tmp_path / "curves.png", [log], {"rl": {"loss, nats": "loss"}})
    with pytest.raises(KeyError):
        data_prep.curves(tmp_path / "curves.png", [log], {"rl": {"loss, nats": "lost"}})

@parametrize("values, ticks", rows("""
    3 37          | 0 10 20 30 40
    40 nan        | 0 10 20 30 40
    100 58        | 0 20 40 60 80 100
    7 400         | 0 100 200 300 400
    0.11 0.3      | 0 0.1 0.2 0.3
    -7.2 14       | -10 -5 0 5 10 15
    -0.002        | -0.002 -0.0015 -0.001 -0.0005 0
    0 nan         | 0
"""))
def test_an_axis_has_round_numbers_that_reach_over_0_and_all_values(values, ticks):
    values, ticks = (np.array(text.split(), float) for text in (values, ticks))
    assert data_prep._ticks([values]) == pytest.approx(ticks)

def test_several_runs_are_their_mean_in_a_pale_band_and_a_gap_is_of_all_runs():
    def colours(*runs):  # at the left, between x = 1 and 2: at y = 10, between, 5, between
        chart = data_prep._draw_chart("title", {"a": ([0, 1, 2], *runs)})
        return [chart.getpixel((330, y)) for y in (97, 200, 260, 320)]
    white, blue = (255, 255, 255), (0, 114, 178)
    _, upper, mean, lower = colours([10, 10, 10], [0, 0, 0])
    assert mean == blue and upper == lower and upper not in (white, blue)
    assert colours([10, 10, 10], [None] * 3) == [blue, white, white, white]
    assert colours([None] * 3, [10, 10, 10]) == [blue, white, white, white]
    assert colours([10, None, 10], [None, None, 0])[1:] == [white] * 3

def test_every_text_of_a_chart_is_whole_and_apart_from_the_others(monkeypatch):
    boxes, written = [], []
    def text(draw, at, words, fill, font, anchor="la"):
        written.append(words)
        boxes.append(draw.textbbox(at, words, font, anchor))
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    panels = [(f"{stage}: {title}", names.split())
              for stage, charts in vrrl.CHARTS.items() for title, names in charts.items()]
    panels += [(title, study.NAMES.values()) for title, _ in
               [*study.panels({"rows": [], "training": {}}), *study.when_panels({"entries": []})]]
    panels.append(("a title that is " + "very " * 9 + "long", [f"seed {n}" for n in range(20)]))
    for (title, names), size in itertools.product(panels, (-8e-4, 1, -9e5, 2e7)):
        boxes.clear()
        written.clear()
        data_prep._draw_chart(title, {name: ([1, 123_456], [None, None]) for name in names} |
                              {"some": ([1, 600_000], [size, -size / 9])})
        assert " ".join(written).startswith(title) and len(boxes) > 8
        assert {"some", *(f"{name}: no values" for name in names)} <= {*written}
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= 680 and 0 <= y0 < y1 <= 480
        for one, other in itertools.combinations(boxes, 2):
            x0, y0 = np.maximum(one[:2], other[:2])
            x1, y1 = np.minimum(one[2:], other[2:])
            assert x0 >= x1 or y0 >= y1

def test_letters_that_the_font_lacks_are_written_as_escapes_in_whole_lines(tmp_path, monkeypatch):
    lines = []
    def text(draw, at, words, fill, font):
        lines.append((draw.textbbox(at, words, font), words))
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    words = "é請 \N{GRINNING FACE}\n<ANSWER>3 4</ANSWER>" + " down" * 200
    row = {"label": words, "images": [Image.new("RGB", (9, 9))] * 2, "captions": [words, words],
           "verdicts": ["", "right"]}
    data_prep.film_strip(tmp_path / "strip.png", [row, row], words)
    whole = " ".join(line for _, line in lines)
    assert whole.isascii() and whole.count(r"\xe9\u8acb \U0001f600 <ANSWER>3 4</ANSWER>") == 7
    assert whole.count("[...]") == 4  # the captions; each of them has its 24 lines
    width, height = Image.open(tmp_path / "strip.png").size
    for (x0, y0, x1, y1), _ in lines:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    for (one, _), (other, _) in itertools.combinations(lines, 2):
        assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]

def test_a_study_has_a_run_for_each_seed_in_its_charts():
    found = {"rows": [], "training": {"rl": {}}}
    for seed, (split, right) in itertools.product((0, 1), enumerate((0.2, 0.4))):
        after = [right + seed, 1 - right]
        row = {"method": "rl", "seed": seed, "split": split, "ood": True, "after_turn": after}
        found["rows"] += [row, row | {"ood": False, "after_turn": [0, 0]}]
        figures = dict.fromkeys(study.LOGGED) | {"commit_wrong": 0.5 + seed}
        found["training"]["rl"][str(seed)] = [[step, *figures.values()] for step in (7, 14)]
    charts = [panel for _, panel in study.panels(found)]
    expected = [[1, 2], [30, 70], [130, 70]], [[7, 14], [50, 50], [150, 150]]
    for chart, lines in zip(charts, expected):
        assert [*chart] == ["plain RL"]
        assert np.array([*chart["plain RL"]]) == pytest.approx(np.array(lines))
    assert np.isnan(charts[2]["plain RL"][1:]).all()

def test_all_models_repair_the_same_first_turns():
    policy, task, cfg = policy_of("taught"), made("grounding"), settings("eval.probes=yes")
    _, fixed, _ = vrrl.evaluate(policy, task, cfg)
    rows, same, _ = vrrl.evaluate(policy_of(), task, cfg, fixed)  # another model
    assert same == fixed and sum(map(len, fixed.values())) > 3
    for row, view in itertools.product(rows, ("fixed", "other_picture", "blank", "hidden")):
        examples = task.examples(f"test_{row['split']}")
        wanted = [example["id"] in fixed[row["split"]] for example in examples]
        for figure in ("repair", "once"):
            bits = row[f"{figure}_{view}_by_question"]
            assert [bit != "-" for bit in bits] == wanted

def test_probes_show_what_their_names_say(monkeypatch):
    policy, task, grey = policy_of("taught"), made("grounding"), (128, 128, 128)
    one, two = task.examples("train")[:2]
    failed = [(one, answer("0 0")), (two, answer("1 24"))]
    found = vrrl.probes(task, failed)
    blank = found["blank"]["feedback"](one, (0, 0))
    assert blank.getcolors() == [(48 * 48, grey)]
    other = found["other_picture"]["feedback"](one, (0, 0))
    assert other == task.feedback(two, (1, 24))
    calls = calls_of(monkeypatch, vrrl, "play")
    vrrl.play_greedy(policy, task, failed[:1], 3, **found["hidden"])
    (((_, _, (start,), *_), _),) = calls
    assert start.question_picture.image.getcolors() == [(96 * 96, grey)]
    assert start.given[0].picture.image == task.feedback(one, (0, 0))

# ==================== Runs ========================================================================
def words_of(folder, *more):
    """A short run of the taught model in `folder`."""
    words = "policy.temperature=1 sft.first_steps=0 sft.steps=1 rl.steps=6".split()
    return [*BASE, f"model={taught()}", *words, f"run={folder}", *more]

def start(*words):
    """`python WORDS` in a process of its own, with one thread."""
    return subprocess.Popen(
        [sys.executable, *words], cwd=vrrl.HERE, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

def ended(process, code=0):
    """(what it printed, its last line of errors), once it has ended with this exit code."""
    text, error = process.communicate(timeout=150)
    assert process.returncode == code, error
    return text, error.splitlines()[-1] if error else ""

@functools.cache
def whole():
    """The folder of a run that was not disturbed."""
    vrrl.main(words_of(HOME / "whole" / "run"))
    return HOME / "whole" / "run"

def copy_of_whole(folder):
    """A copy of that run, and of the SFT beside it."""
    shutil.copytree(whole().parent, folder / "copy")
    return folder / "copy" / "run"

def test_a_run_leaves_its_table_pictures_and_figures():
    folder = whole()
    assert {*os.listdir(folder)} == {*"""settings.yaml metrics.jsonl results.json report.md
        curves.png episodes.png model lock""".split()}
    expected = [*itertools.product(("sft", "vrrl"), made("grounding").splits)]
    assert [(row["method"], row["split"]) for row in rows_of(folder)] == expected
    for model, split in expected:
        assert f"| {model} | {split} | 3 |" in (folder / "report.md").read_text()
    lines = lines_of(folder)
    assert [(line["stage"], line["step"]) for line in lines] == [("rl", n) for n in range(1, 7)]
    assert max(line["off_policy"] for line in lines) < 2e-4
    assert max(line["rollins"] for line in lines) > 0
    _, flat = vrrl.read_config(words_of(folder))
    assert flat.items() <= yaml.safe_load((folder / "settings.yaml").read_text()).items()

@parametrize("short, said", [
    ("A 3 3; T R; F", "committed   last turn: <FINAL>"),
    ("A 3 3; T R", "not committed: the limit of turns"),
    ("A 3 3; T R; <FINAL>", "not committed: a turn that cannot be read   last turn: <FINAL>")])
def test_a_strip_says_why_its_episode_ended_and_frames_the_target(
        short, said, tmp_path, monkeypatch):
    task, calls = made("grounding"), calls_of(monkeypatch, data_prep, "film_strip")
    example = task.examples("train")[0]
    right = task.say(task.solution(example))
    found = vrrl.outcome(task, scripted(policy_of(), short.replace("R", right)))
    played = {split: [] for split in task.splits} | {"id": [found]}
    row = {"split": "id", "ood": False, "n": 1, "turns": 2, **dict.fromkeys(vrrl.COLUMNS)}
    run = SimpleNamespace(folder=tmp_path, metrics=None, finish=lambda **_: None)
    vrrl.report(run, task, {"model": [row]}, played)
    (((_, (strip,), _), _),) = calls
    assert f"{example['id']}   {said}" in strip["label"]
    assert strip["verdicts"] == ["", "wrong", "right"]
    # The frame is just outside of the box, and the picture of the data stays as it is.
    x0, y0, x1, y1 = example["box"]
    picture, plain = (np.array(image) for image in (strip["images"][0], task.image(example)))
    changed = (picture != plain).any(-1)
    assert changed.any() and (picture[changed] == (255, 0, 255)).all()
    assert not changed[y0:y1, x0:x1].any() and changed[[y0 - 1, y1], x0:x1].all()

def test_the_model_that_a_run_leaves_has_the_runs_figures(tmp_path):
    words = "mode=eval", f"model={whole()}", "eval.probes=yes"  # the folder of a run will do
    vrrl.main(words_of(tmp_path / "eval", *words))
    assert "| once fixed | once other picture |" in (tmp_path / "eval/report.md").read_text()
    assert "once" not in (whole() / "report.md").read_text()
    trained = [row for row in rows_of(whole()) if row["method"] == "vrrl"]
    for row, again in zip(trained, rows_of(tmp_path / "eval"), strict=True):
        for figure in "split final commit turns first_by_question final_by_question".split():
            assert row[figure] == again[figure]

def test_two_models_are_compared_on_the_wrong_answers_of_the_first(tmp_path):
    words = "mode=eval", f"model={whole()}", f"eval.against={taught()}"
    vrrl.main(words_of(tmp_path / "eval", *words))
    rows = rows_of(tmp_path / "eval")
    first, second = rows[:4], rows[4:]
    assert [row["method"] for row in rows] == 4 * [str(taught())] + 4 * [str(whole())]
    for row, other in zip(first, second, strict=True):
        asked = [bit != "-" for bit in row["repair_fixed_by_question"]]
        assert asked == [bit != "-" for bit in other["repair_fixed_by_question"]]

@parametrize("words, said, pictures", [
    (["seed=4"], ["question: find the red", "turn 1: "], 1),
    (["say=12 7"], ["turn 1: <ANSWER> 12 7 </ANSWER>"], 2),
    (["say=12 7", "probe=blank"], ["turn 1: "], 2),
    (["picture=PICTURE", "question=the red", "say=3 4"], ["question: the red", "turn 1: "], 2)])
def test_ask_plays_one_episode_and_paints_it(tmp_path, capsys, monkeypatch, words, said, pictures):
    Image.new("RGB", (120, 90), "red").save(tmp_path / "my.png")
    words = [word.replace("PICTURE", str(tmp_path / "my.png")) for word in words]
    strips = calls_of(monkeypatch, data_prep, "film_strip")
    model = f"model={taught()}"
    vrrl.main(words_of(tmp_path / "ask", "mode=ask", model, *words))
    printed = capsys.readouterr().out
    assert all(text in printed for text in said)
    assert (tmp_path / "ask" / "ask.png").is_file()
    (_, [row], *_), _ = strips[-1]  # those before are previews of data that was made
    assert len(row["images"]) >= pictures
    if "probe=blank" in words:
        assert row["images"][1].getcolors() == [(row["images"][1].size[0] ** 2, (128, 128, 128))]

def test_ask_refuses_what_is_no_answer(fails, tmp_path):
    line = fails(vrrl.main, words_of(tmp_path / "ask", "mode=ask", "say=up there"))
    assert "say=up there is no answer; one would be say=" in line
    for word in ("picture=my.png", "question=the red"):
        assert "need each other" in fails(vrrl.main, words_of(tmp_path / "ask", "mode=ask", word))
    assert "give say= too" in fails(vrrl.main, words_of(tmp_path, "mode=ask", "probe=blank"))

def test_the_same_command_prints_the_table_and_other_settings_are_refused(capsys, fails):
    before = contents(whole().parent)
    capsys.readouterr()
    vrrl.main(words_of(whole()))
    assert (whole() / "report.md").read_text() in capsys.readouterr().out
    line = fails(vrrl.main, words_of(whole(), "rl.lr=0.01"))
    assert "rl.lr=" in line and "now 0.01" in line and str(whole()) in line
    assert contents(whole().parent) == before  # neither trains

def test_a_table_that_was_lost_is_written_again(tmp_path):
    folder = copy_of_whole(tmp_path)
    table = (folder / "report.md").read_bytes()
    (folder / "report.md").unlink()
    vrrl.main(words_of(folder))
    assert (folder / "report.md").read_bytes() == table

def test_a_run_goes_on_with_other_sizes_of_batches_and_notes_them(tmp_path):
    words, smaller = words_of(tmp_path / "run"), ["policy.micro=7", "policy.rows=20"]
    process = start("-c", HURRY, *words)
    while not (tmp_path / "run" / "rl.checkpoint").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    vrrl.main([*words, *smaller])
    notes = (tmp_path / "run" / "changes.txt").read_text()
    assert all(word in notes for word in smaller)
    assert len([*tmp_path.glob("sft-*")]) == 1  # SFT was not begun anew
    for line, other in zip(lines_of(tmp_path / "run"), lines_of(whole()), strict=True):
        assert line["reward"] == pytest.approx(other["reward"], abs=1e-4)

# A clock 1000 times as fast: checkpoints come after milliseconds. A background job ignores Ctrl-C.
HURRY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
clock = time.time
time.time = lambda: 1000 * clock()
import vrrl
vrrl.run_main(vrrl.main, sys.argv[1:])
"""
@pytest.mark.skipif(GPU, reason="on a GPU runs are not equal byte for byte")
def test_a_run_that_was_stopped_and_killed_ends_as_one_that_was_not(tmp_path):
    folder = tmp_path / "run"
    for number, step, code in ((signal.SIGINT, 2, 130), (signal.SIGKILL, 4, -9)):
        run, log = start("-c", HURRY, *words_of(folder)), folder / "metrics.jsonl"
        while run.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
            time.sleep(0.02)
        run.send_signal(number)
        _, line = ended(run, code)
        assert code < 0 or "stopped; the same command goes on" in line
        assert [*folder.glob("rl.checkpoint")]
    ended(start("vrrl.py", *words_of(folder)))
    for name in ("report.md", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole() / name).read_bytes(), name
    assert untimed(folder) == untimed(whole())

def untimed(folder):
    """The lines of a log without their seconds."""
    lines = []
    for line in lines_of(folder):
        lines.append({key: line[key] for key in line if "seconds" not in key})
    return lines

@parametrize("name, content", [
    ("run/settings.yaml", "a: ["),
    ("sft-*/settings.yaml", "5"),
    ("sft-*/evaluation-*.json", "{"),
    ("sft-*/model/config.json", ""),
    ("run/rl.checkpoint", "x")])
def test_a_damaged_file_of_a_run_is_named_in_one_line(fails, tmp_path, name, content):
    run = copy_of_whole(tmp_path)
    (run / "results.json").rename(run / "rl.checkpoint")  # as in a run that has not ended
    (file,) = run.parent.glob(name)
    file.write_text(content)
    line = fails(vrrl.main, words_of(run))
    assert str(file) in line or str(file.parent) in line

def test_a_setting_that_is_younger_than_a_run_counts_as_its_default(tmp_path, fails, capsys):
    run = copy_of_whole(tmp_path)
    lines = (run / "settings.yaml").read_text().splitlines(keepends=True)
    lines = [line for line in lines if not line.startswith("rl.kl")]
    (run / "settings.yaml").write_text("".join(lines))
    (run / "metrics.jsonl").write_bytes(b"\xff\n[]\n{\n")  # not looked at
    vrrl.main(words_of(run))
    assert "| vrrl | id |" in capsys.readouterr().out
    assert "rl.kl=" in fails(vrrl.main, words_of(run, "rl.kl=0.5"))

def test_a_model_that_has_had_its_sft_goes_straight_to_rl(tmp_path):
    (sft,) = whole().parent.glob("sft-*")
    words = "sft.steps=0", "method=sft", "rl.questions=16", "rl.steps=1"
    vrrl.Run(tmp_path / "run", {"seed": 5}).lock.close()  # it has trained nothing: no refusal
    vrrl.main(words_of(tmp_path / "run", f"model={sft / 'model'}", *words))
    assert {row["method"] for row in rows_of(tmp_path / "run")} == {"sft", "sft + RL"}

def test_two_workers_train_as_one(tmp_path):
    words = "rl.steps=3", "sft.steps=2", "rl.rho=0", "device=cpu"  # one GPU takes one worker
    workers = "-m torch.distributed.run --nproc-per-node=2 --master-addr=127.0.0.1 vrrl.py".split()
    two = start(*workers, *words_of(tmp_path / "two" / "run", *words))
    vrrl.main(words_of(tmp_path / "one" / "run", *words))
    ended(two)
    for stage in ("sft-*", "run"):
        (one,), (two,) = (tmp_path / "one").glob(stage), (tmp_path / "two").glob(stage)
        for line, other in zip(untimed(one), untimed(two), strict=True):
            assert line == pytest.approx(other, abs=1e-4)

@parametrize("task, method", [
    ("navigation", "vrrl"), *(("grounding", method) for method in CONFIG["methods"])])
def test_every_method_runs_and_changes_weights(task, method, monkeypatch):
    folder, steps = HOME / task / method, CONFIG["methods"][method].get("rl.steps", 1)
    if task == "navigation":  # of which the model has not learnt to speak
        monkeypatch.setattr(vrrl, "reward", paid_by_chance)
    words = f"task={task}", f"method={method}", f"rl.steps={steps}", "rl.questions=16"
    vrrl.main(words_of(folder, *words))
    assert {row["method"] for row in rows_of(folder)} == {"sft", method}
    if steps:
        own = load_file(folder / "model" / "model.safetensors")
        for sft in folder.parent.glob("sft-*/model/model.safetensors"):
            assert furthest(own.values(), load_file(sft).values()) > 1e-7

def six_steps(folder, dtype=torch.float32, upto=6):
    """(numbers, weights, states) of steps as a stage takes them, with a checkpoint after each."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2, bias=False, dtype=dtype)
    optimizer, buffer = vrrl.AdamW(SimpleNamespace(model=module)), vrrl.Buffer(9, 0.3)
    run, seen = vrrl.Run(folder, {"a": 1}), []
    for step in run.steps("rl", 6, optimizer, buffer):
        loss = (step * module.weight).sum()
        loss.backward()
        optimizer.step(0.01)
        buffer.add([f"q{step}", [[step]], step % 2 == 0])
        run.log(twice=2 * step)
        run.save(optimizer, buffer)
        seen.append(step)
        if step == upto:
            break
    return seen, weights_of(module).tolist(), [*buffer.wrong], [*buffer.correct]

@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_goes_on_from_its_last_checkpoint(tmp_path, dtype):
    _, *expected = six_steps(tmp_path / "a", dtype)
    six_steps(tmp_path / "b", dtype, upto=3)
    seen, *found = six_steps(tmp_path / "b", dtype)
    assert seen == [4, 5, 6] and found == expected
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")

@parametrize("what", ["checkpoint", "file", "model"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(what, tmp_path, fails):
    policy, run = policy_of(), vrrl.Run(tmp_path, {"a": 1})
    optimizer = vrrl.AdamW(policy)
    def train(steps):
        for _ in run.steps("rl", steps, optimizer):
            pass
    train(1)
    policy.save(tmp_path / "model")
    data_prep.write_file(tmp_path / "file", "before")
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # of a file: as a full disk
    try:
        if what == "checkpoint":
            line = fails(train, 2)
        elif what == "file":
            line = fails(data_prep.write_file, tmp_path / "file", "x" * 400_000)
        else:
            line = fails(policy.save, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "large" in line or "cannot be written" in line
    assert contents(tmp_path) == before

# ==================== Bad input: settings, models =================================================
@parametrize("word, said", rows("""
    rl.step=3            | nearest: rl.steps
    lr=1                 | nearest:
    --seed               | key=value
    seed=three           | 0 to 1000000
    rl.steps=1.5         | a whole number
    rl.rho=1.01          | 0 to 1
    rl.lr=nan            | 1e-12 to 1
    rl.max_turns=1       | 2 to 64
    rl.std_norm=maybe    | yes, no
    method=none          | sft
    points.question=find | text {question}
    data=config.yaml     | needs task=points
    model=nowhere        | model=nowhere
    model=assets/x       | config.json
    model=/tmp           | /tmp
    model=               | model=
    none.yaml            | none.yaml: cannot be read
"""))
def test_a_wrong_word_of_settings_is_one_clear_line(fails, word, said):
    assert said in fails(vrrl.main, [word])

@parametrize("text, said", rows("""
    rl: {steps: [  | as YAML
    [1, 2]         | not a table
    rl: {stepz: 3} | nearest: rl.steps
    seed: ÿ        | seed=
    rl: {rho: 1}; seed: 2; rl: {steps: 3} | line 3: 'rl' is there for the second time
    rl: {steps: 3, steps: 4}       | line 1: 'steps'
    rl: {steps: 3}; rl.steps: 3    | rl.steps is given twice
    seed:                          | seed=None
    seed: yes                      | seed=True
    seed: 3.0                      | a whole number
    rl:                            | unknown setting 'rl'
    points.reply:                  | points.reply=None
    policy.system: yes             | policy.system=True
    run: 2026-01-01                | run=2026
    rl.std_norm: 3                 | rl.std_norm=3
    rl.mask: no                    | rl.mask=False
"""))
def test_a_wrong_file_of_settings_is_one_clear_line(fails, tmp_path, text, said):
    (tmp_path / "my.yaml").write_text(text.replace("; ", "\n"))
    assert said in fails(vrrl.main, [str(tmp_path / "my.yaml")])

def without(name):
    return lambda folder: (folder / name).unlink()

def changed(name, **keys):
    def change(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | keys))
    return change

def without_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

def not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

def thinking(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant\n{%", "assistant\n<think>{%"))

def rewritten(old, new):
    def change(folder):
        text = (folder / "chat_template.jinja").read_text()
        assert old in text
        (folder / "chat_template.jinja").write_text(text.replace(old, new))
    return change

def sliding(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["layer_types"] = 3 * ["full_attention"] + ["sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))

def more_words(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{n}" for n in range(99)])
    tokenizer.save_pretrained(folder)

def adapters_alone(folder):
    (folder / "adapter_config.json").write_text("{}")

@parametrize("change, said", [
    (without("model.safetensors"), "model"),
    (without("tokenizer.json"), "has no tokenizer.json"),
    (without("preprocessor_config.json"), "image processor"),
    (without("config.json"), "config.json"),
    (without_a_tensor, "lack 1 tensors"),
    (not_finite, "is not finite"),
    (changed("config.json", model_type="qwen2_vl"), "it is a qwen2_vl"),
    (changed("preprocessor_config.json", patch_size=14), "(14, 2, 2) in its image processor"),
    (changed("preprocessor_config.json", merge_size=1), "(8, 1, 2) in its image processor"),
    (thinking, "opens a turn otherwise"),
    (rewritten("<|im_end|>", " find <|im_end|>"), "no special token"),
    (rewritten("<|image_pad|>", "<|video_pad|>"), "image token"),
    (rewritten("<|image_pad|>", "{{ 'image' / 2 }}"), "cannot be loaded"),
    (sliding, "other than full attention"),
    (more_words, "words, its embedding"),
    (adapters_alone, "adapters alone")])
def test_models_with_lost_or_unfit_parts_are_refused_in_one_line(fails, tmp_path, change, said):
    shutil.copytree(folder_of("embedded"), tmp_path / "model")
    change(tmp_path / "model")
    word = f"model={tmp_path / 'model'}"
    line = fails(vrrl.main, words_of(tmp_path / "run", word, "mode=eval"))
    assert word in line and said in line

def test_tokens_that_are_special_in_one_list_alone_cannot_be_sampled(tmp_path):
    shutil.copytree(folder_of("embedded"), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    word = next(word for word in tokenizer.get_vocab() if word.isalpha())
    number = tokenizer.convert_tokens_to_ids(word)
    token = tokenizers.AddedToken(word, special=True)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    assert number not in tokenizer.all_special_ids
    policy = vrrl.load_policy(str(tmp_path / "model"), settings())
    assert policy.banned[number]

@parametrize("text", ["find <|im_end|>", "<|image_pad|>", "find \ue000"])
def test_texts_with_tokens_of_the_models_own_are_refused_where_they_stand(fails, tmp_path, text):
    line = fails(own, tmp_path, {"question": text})
    assert "my.jsonl:2" in line and "means something else" in line
    for key in ("points.reply", "policy.system"):
        line = fails(vrrl.main, words_of(tmp_path / key, f"{key}={text}", "mode=eval"))
        assert f"{text!r} holds" in line

def test_what_cannot_be_written_or_said_is_one_clear_line(fails, tmp_path):
    (tmp_path / "file").write_text("in the way")
    data = f"data={tmp_path / 'file' / 'data'}"
    for folder, word, said in (
            ("file/run", "seed=0", str(tmp_path)),
            ("b", data, str(tmp_path)),
            ("c", "points.reply=lookout", "lookout"),  # the model lacks it
            ("d", f"points.reply={'find ' * 5000}", "tokens; the model can read 4096"),
            ("e", "policy.max_new=4", "policy.max_new=4 is too small")):
        assert said in fails(vrrl.main, words_of(tmp_path / folder, word))
    with data_prep.lock(tmp_path / "a"):
        assert "in use" in fails(vrrl.main, words_of(tmp_path / "a"))

@parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")], ids=str)
def test_where_memory_runs_out_a_line_says_what_to_lower(fails, error):
    def run():
        raise error
    line = fails(run)
    assert "policy.rows" in line and "policy.max_pixels" in line

def test_a_message_is_a_short_line_that_promises_no_checkpoint_where_there_is_none(
        fails, tmp_path, monkeypatch):
    def run():
        raise data_prep.UserError(f"{'A' * 400_000} is no file")
    monkeypatch.setattr(vrrl.Run, "has_checkpoint", False)
    line = fails(run)
    assert len(line) <= 300 and "AAAA" in line  # a word of any length
    for word in ("task=points", "task=points data=none.jsonl", f"task=points data={tmp_path}"):
        line = fails(vrrl.main, words_of(tmp_path / "run", *word.split()))
        assert "checkpoint" not in line and len(line) < 300
    six_steps(tmp_path / "run", upto=2)
    assert fails(run).endswith("goes on from the last checkpoint")

@parametrize("split", ["dev", "test"])
def test_a_question_of_any_split_that_the_model_cannot_read_is_refused(fails, tmp_path, split):
    words = words_of(tmp_path / "run", f"data={tmp_path / 'data'}", f"eval.splits={split}")
    task = vrrl.Grounding(settings(*words))
    file = task.folder / f"{split}_bars.jsonl"
    file.write_text(file.read_text().replace('"question": "', '"question": "zebra ', 1))
    assert "zebra" in fails(vrrl.main, words)
    assert not (tmp_path / "run").exists()  # before any work

@parametrize("well_formed, final, said", rows("""
    0.05 | 0   | malformed
    1    | 1   | correct
    1    | 0   | wrong
    1    | 0.5 | temperature
"""))
def test_ten_steps_that_teach_nothing_are_explained_once(
        tmp_path, capsys, well_formed, final, said):
    run, optimizer = vrrl.Run(tmp_path, {"a": 1}), vrrl.AdamW(policy_of())
    figures = {"well_formed": float(well_formed), "final": float(final)}
    for step in run.steps("rl", 40, optimizer):
        run.log(**figures, skipped=int(step > 12))  # from step 13 on
        printed = capsys.readouterr().err
        assert ("warning" in printed) == (step == 22) == (said in printed)

# ==================== Bad input: one's own data ===================================================
GOOD = {"image": "picture1.png", "question": "find the red", "box": [1, 2, 13, 14]}

def own(folder, *more, count=24, size=(40, 30), box=(4, 5, 21, 25.5), splits=(None,), words=()):
    """One's own data: a JSONL file of pictures, with more lines in second place. splits: those that
    the lines name in turn."""
    folder.mkdir(exist_ok=True)
    lines = []
    for n in range(count):
        for kind in ("png", "bmp"):  # one picture in two files
            Image.new("RGB", size, (n, 0, 0)).save(folder / f"picture{n}.{kind}")
        line = {"image": f"picture{n}.png", "box": box, "split": splits[n % len(splits)]}
        lines.append({**GOOD, **line})
    lines[1:1] = [{**GOOD, **line} for line in more]
    text = "\n".join(map(json.dumps, lines))
    (folder / "my.jsonl").write_text(text, "utf-8-sig")
    return vrrl.OwnPoints(settings("task=points", f"data={folder / 'my.jsonl'}", *words))

@parametrize("line, reason", rows("""
    {"image": "none.png"}            | none.png
    {"image": "/etc/passwd"}         | leads out
    {"image": "../x.png"}            | leads out
    {"image": "my.jsonl"}            | not a usable image
    {"image": 3}                     | "image"
    {"id": 5}                        | "id"
    {"id": "line-1"}                 | twice
    {"question": " "}                | "question"
    {"box": null}                    | "box"
    {"box": [1, 2, 3, true]}         | "box"
    {"layout": [], "question": null} | "question"
    {"box": [5, 2, 5, 9]}            | empty
    {"box": [0, 0, 1, 0.5]}          | normalised
    {"box": [-1, 2, 8, 9]}           | leaves its image of 40 x 30
    {"box": [1, 2, 8, 31]}           | 40 x 30
    {"split": "id"}                  | "split" is 'id'
    {"split": "val"}                 | "split"
    {"split": "Train"}               | "split"
    {"split": "dev_id"}              | "split"
    {"split": ""}                    | "split"
    {"split": 1e999}                 | "split"
"""))
def test_a_bad_line_of_ones_own_data_is_named_by_file_and_line(fails, tmp_path, line, reason):
    said = fails(own, tmp_path, json.loads(line))
    assert f"{tmp_path / 'my.jsonl'}:2:" in said and reason in said

def test_a_bar_shows_how_far_ones_own_data_is_read(tmp_path, capsys):
    own(tmp_path, {"id": "one more"})
    assert "read pictures: 100%" in capsys.readouterr().err

def test_ones_own_data_is_divided_by_image_and_goes_through_a_run(tmp_path):
    twins = [{"image": f"picture{n}.bmp", "box": [0, 0, 9, 9]} for n in range(24)]
    task, run, whole = own(tmp_path, *twins), tmp_path / "run", []
    for part in ("train", "dev_id", "test_id"):
        images = [example["image"] for example in task.examples(part)]
        whole += images
        for name in images:  # a copy of a picture is in the same part
            stem, _, _ = name.partition(".")
            assert f"{stem}.bmp" in images and f"{stem}.png" in images
    assert len(whole) == len(set(whole)) == 48 and len(task.examples("train")) > 24
    vrrl.main(words_of(run, "task=points", f"data={tmp_path / 'my.jsonl'}", "rl.steps=0",
                       "points.question={question} the"))
    assert (run / "episodes.png").is_file()
    for part in ("train", "dev_id", "test_id"):
        with Image.open(run / f"preview_{part}.png") as image:
            magenta = (np.asarray(image) == (255, 0, 255)).all(-1)
        assert magenta.sum() > 500  # the frames

def test_lines_may_name_their_split_and_one_of_ones_own_is_out_of_distribution(tmp_path):
    splits = "train", "dev", "test", "night", None, "dusk2"
    task, run = own(tmp_path, splits=splits), tmp_path / "run"
    assert task.splits == ["id", "night", "dusk2"]
    plain = own(tmp_path / "plain").own  # without a name lines are divided as ever
    parts = "train", "dev_id", "test_id", "test_night", None, "test_dusk2"
    assert {*task.own} == {*parts} - {None}
    for part, examples in task.own.items():
        for example in examples:
            number = int(re.search(r"\d+", example["image"])[0])
            there = example["image"] in [e["image"] for e in plain.get(part, ())]
            assert parts[number % 6] == part or number % 6 == 4 and there
    words = "task=points", f"data={tmp_path / 'my.jsonl'}", "points.question={question} the"
    vrrl.main(words_of(run, *words, "rl.steps=0"))
    found = [(row["split"], row["ood"], row["n"]) for row in rows_of(run)[:3]]
    assert found[0][:2] == ("id", False) and found[1:] == [("night", True, 4), ("dusk2", True, 4)]
    # Who chooses on dev sees no test picture; and what has no training pictures can be evaluated.
    assert own(tmp_path, splits=splits, words=["eval.splits=dev"]).splits == ["id"]
    assert own(tmp_path, splits=["night"], words=["mode=eval"]).splits == ["night"]

@parametrize("splits, words, said", [
    (["test", "night"], [], "too few pictures for train"),
    (["train"], [], "too few pictures for train or for test"),
    (["train", "test", "night"], ["eval.splits=dev"], "or for dev")])
def test_a_split_without_pictures_is_one_clear_line(fails, tmp_path, splits, words, said):
    assert said in fails(own, tmp_path, splits=splits, words=words)

def test_a_picture_and_its_copies_are_in_one_split(fails, tmp_path):
    copy = {"image": "picture3.bmp", "split": "night"}
    line = fails(own, tmp_path, copy, splits=["train", "test"])
    assert "my.jsonl:5: its picture is in test_night" in line and "here in test_id" in line
    own(tmp_path, copy | {"split": "test"}, splits=["train", "test"])

@parametrize("data, changed", [
    ("my.jsonl", "my.jsonl"), ("my.jsonl", "picture3.png"), ("", "picture3.png")])
def test_a_run_knows_its_data_by_what_is_in_the_files(tmp_path, data, changed):
    own(tmp_path)
    (tmp_path / "data.json").write_text("{}")  # as a folder of imported maps has it
    cfg = settings("task=points", f"data={tmp_path / data}")
    before = vrrl.fingerprint(cfg)
    with open(tmp_path / changed, "a") as file:
        file.write("\n")
    after = vrrl.fingerprint(cfg)
    assert {key for key in before if before[key] != after[key]} == {"data_files"}

def test_ones_own_data_that_cannot_be_used_is_one_clear_line(fails, tmp_path):
    assert "my.jsonl" in fails(own, tmp_path, count=2)
    assert "900 x 3" in fails(own, tmp_path, size=(900, 3), box=(4, 0, 9, 2))
    own(tmp_path / "long", size=(400, 2), box=(4, 0, 9, 2))  # 200:1 is taken
    task = own(tmp_path / "tiny", box=(2.1, 2.1, 2.2, 2.2))
    assert "points.scale" in fails(task.demonstrations)
    words = words_of(tmp_path / "run", "task=points", f"data={tmp_path / 'none.jsonl'}")
    assert "none.jsonl" in fails(vrrl.main, words)

ODD = r'''null true -1 1e999 NaN 0.5 [] {} , "" "x" "4" "id" "layout" "line-1" "\ud800" "\u0000" "."
    "none.png" "zero.png" "cut.png" "out.png" "../x.png" "/etc/passwd" "my.jsonl" "picture2.png"
    '''.split() + ['" "', "9" * 5000, "[" * 100_000, "\0", "\r", ""]
ENDS = ["\n"] * 9 + ["\r\n", "\n \n", "\r"]
CODES = ["utf-8"] * 9 + ["utf-8-sig", "utf-16", "cp500"]

def spoilt(rng, text):
    """A file with odd parts in a line; perhaps with other ends of lines, encoding, or byte."""
    def odd(part):
        return rng.choice(ODD) if rng.random() < 0.02 else part[0]
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = re.sub(r'"[^"]*"|[-.\d]+|.', odd, lines[at])
    content = bytearray(rng.choice(ENDS).join(lines), rng.choice(CODES))
    content[rng.randrange(len(content))] ^= rng.choice([0] * 9 + [1, 32, 255])
    return bytes(content)

def in_short(records):
    """What must be read rightly, in any order."""
    return sorted(json.dumps([r["image"], r.get("question"), r.get("box")]) for r in records)

@parametrize("name, count", [("points", 1000), ("grounding", 300), ("navigation", 300)])
def test_a_fuzzed_file_of_examples_is_read_rightly_or_named_with_its_line(tmp_path, name, count):
    task, rng, refused = own(tmp_path, count=12), random.Random(0), 0
    file = tmp_path / "my.jsonl"
    if name != "points":
        task = vrrl.TASKS[name](settings(f"task={name}", f"data={tmp_path}", "make.train=12"))
        file = task.folder / "train.jsonl"
    def read():
        if name == "points":
            return sum(vrrl.OwnPoints(task.cfg).own.values(), [])
        return task.examples("train")
    (task.folder / "cut.png").write_bytes((tmp_path / "picture1.png").read_bytes()[:-20])
    (task.folder / "zero.png").touch()
    (task.folder / "out.png").symlink_to("/etc/passwd")
    whole = file.read_text("utf-8-sig")
    for _ in range(count):
        content = spoilt(rng, whole)
        file.write_bytes(content)
        try:
            found = read()
        except vrrl.UserError as error:
            assert re.fullmatch(rf"{file}(:\d+: .+|: too few .+)", str(error))
            refused += 1
            continue
        lines = [line.decode("utf-8-sig") for line in content.split(b"\n") if line.strip()]
        assert in_short(found) == in_short(map(json.loads, lines))
        for example in found:
            (x0, y0, x1, y1), (width, height) = example.get("box", (0, 0, 2, 2)), example["size"]
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            with contextlib.suppress(vrrl.UserError):  # a picture that changed, a tiny box
                wrong = task.mistake(example, rng)
                task.feedback(example, wrong)
    assert 0.1 < refused / count < 0.9

# ==================== Bad input: pictures, the authors' files =====================================
def test_an_image_that_is_huge_or_unclear_is_refused_by_name(tmp_path):
    for name, mode, form in ("key", "I;16", "PNG"), ("deep", "I", "TIFF"), ("float", "F", "TIFF"):
        Image.new(mode, (2, 2)).save(tmp_path / f"{name}.png", form, transparency=0)
    Image.new("1", (4097, 30)).save(tmp_path / "huge.png")
    white = {262: 0}  # where white is 0
    Image.new("I;16", (2, 2)).save(tmp_path / "white.png", "TIFF", tiffinfo=white)
    for name in ("key", "deep", "float", "white", "huge", "none"):
        with pytest.raises(vrrl.UserError, match=f"{name}.png: not a usable image"):
            data_prep.load_image(tmp_path / f"{name}.png")

def turned(pixels, orientation):
    """What a viewer makes of pixels with this EXIF orientation, 1 to 8."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation % 4 in (0, 3):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation % 4 in (2, 3) else pixels

def test_pictures_of_every_format_mode_and_orientation_are_shown_as_on_white(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (2, 3, 4), dtype=np.uint8)
    source = Image.fromarray(blocks.repeat(16, 0).repeat(16, 1))
    grey = np.asarray(source.convert("L"))[..., None]
    deep = Image.fromarray(grey[..., 0] * np.uint16(257))
    Image.init()
    forms = {*Image.SAVE} - {*"EPS ICNS ICO IM PALM PDF SPIDER".split()}  # read otherwise
    modes = "1 L LA P PA RGB RGBA RGBX CMYK YCbCr HSV I;16".split()
    saved = 0
    for form, mode, orientation in itertools.product(sorted(forms), modes, range(1, 9)):
        if orientation > 1 and form not in "PNG JPEG WEBP TIFF MPO AVIF".split():
            continue
        exif, file = Image.Exif(), tmp_path / "picture"
        exif[0x112] = orientation
        image = source if mode[-1] in "AP" else source.convert("RGB")
        try:
            image = deep if mode == "I;16" else image.convert(mode)
            image.save(file, form, exif=exif)
        except (OSError, ValueError, KeyError):  # this format has no such mode
            continue
        if orientation == 1:
            with Image.open(file) as plain:
                rgba = np.float64(plain.convert("RGBA"))
                right = 255 - rgba[..., 3:] / 255 * (255 - rgba[..., :3])
                right = grey if plain.mode[0] == "I" else right
        found = np.float64(data_prep.load_image(file))
        assert abs(found - turned(right, orientation)).max() <= 1, (form, mode, orientation)
        saved += 1
    assert saved > 300

def official(folder, *entries):
    """Make a data folder of an evaluation file of the authors; the new folder."""
    (folder / "x.json").write_text(json.dumps(entries), encoding="utf-8-sig")
    data_prep.main(["official", f"data={folder / 'data'}", f"eval={folder / 'x.json'}"])
    return max((folder / "data").glob("official-*"), key=os.path.getmtime)

def entry(picture, *layout, start=0):
    last = len("".join(layout)) - 1
    about = {"layout": layout, "start_pos": start, "target_pos": last}
    return {"input_map": picture, "metadata": about}

@parametrize("entries, said", [
    ([5], ""),
    ([{"id": "a"}], ""),
    ([], "no map"),
    ([entry("a", "SF", "HG")] * 2, "twice"),
    ([entry("a", "SH", "HG")], "no way"),
    ([entry("../a.png", "SF", "HG")], "out"),
    ([entry("link.png", "SF", "HG")], "through a link"),
    ([entry("a", "SF", "HG", start=1)], "start_pos")], ids=str)
def test_what_is_wrong_with_the_authors_maps_is_one_line(tmp_path, capsys, entries, said):
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(SystemExit):
        official(tmp_path, *entries)
    assert re.fullmatch(rf"error: .*x\.json.*{said}.*\n", capsys.readouterr().err)

def test_the_authors_maps_and_pictures_become_a_data_folder(tmp_path):
    image = Image.new("RGB", (48, 44), "white")  # with a margin, as theirs
    image.paste("black", (4, 2, 44, 42))
    image.save(tmp_path / "a.png")
    folder = official(tmp_path, entry("a.png", "SF", "HG"), entry("", "SF", *["FF"] * 4, "FG"))
    task = vrrl.Navigation(settings("task=navigation", f"data={folder}"))
    (one,), (two,) = task.examples("test_id"), task.examples("test_size")
    assert one["layout"] == ["SF", "HG"] and one["box"] == [4, 2, 44, 42]
    assert two["drawn"] == "here"
    shown = task.feedback(one, ("right", "down"))
    changed = (np.asarray(shown) != np.asarray(image)).any(-1)
    assert changed[2:42, 4:44].sum() == changed.sum() > 100  # inside the margin
    assert changed[12, 24] and changed[22, 34]

# ==================== The command, its settings and what it imports ===============================
def test_help_names_every_setting_and_a_mistake_exits_2(capsys):
    text, error = ended(start("vrrl.py", "--help"))
    assert text.startswith("usage: ") and not error
    for key, (_, _, sentence) in TABLE.items():
        assert f" {key.split('.')[-1]}: " in text and sentence in text
    wrong = start("vrrl.py", "rl.stepz=3")
    assert ended(wrong, 2) == ("", "error: unknown setting 'rl.stepz'; nearest: rl.steps")
    data_prep.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: ")

CLASS = (vrrl.HERE / "assets" / "class.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", CLASS, re.DOTALL)
COMMANDS = re.findall(r"^python vrrl.py (.*)$", CLASS, re.MULTILINE)

@parametrize("code, printed", SCRIPTS, ids=range(len(SCRIPTS)))
def test_the_lines_of_the_class_print_what_it_says(code, printed):
    found, _ = ended(start("-c", code))
    assert found == printed

@parametrize("command", COMMANDS)
def test_the_commands_of_the_class_run(command, tmp_path, capsys):
    small = """make.train=60 make.test=3 rl.steps=2 rl.questions=4 rl.samples=4
        eval.max_turns=3 device=cpu""".split()
    vrrl.main([*shlex.split(command), *small, f"data={HOME / 'data'}", f"run={tmp_path / 'run'}"])
    expected = "turn 1: " if "mode=ask" in command else "| **mean ood** |"
    assert expected in capsys.readouterr().out

def test_the_class_edits_lines_that_are_there():
    assert (vrrl.HERE / "vrrl.py").read_text().count("and not rollout.given") == 2
    assert len(SCRIPTS) == 3 and len(COMMANDS) == 10

def test_on_windows_it_says_where_it_runs():
    windows = start("-c", "import sys; sys.modules['fcntl'] = None; import data_prep")
    assert re.fullmatch("error: .*Linux and macOS.*", ended(windows, 1)[1])

def test_every_setting_has_a_range_and_a_sentence():
    rows = {kind: [*CONFIG[f"{kind}s"]] for kind in ("task", "method", "profile")}
    for key, (default, allowed, sentence) in TABLE.items():
        allowed = "|".join(rows[key]) if allowed == "rows" else allowed
        assert allowed.startswith("text") or ".." in allowed or "|" in allowed
        assert vrrl.check_value(key, default, {key: (default, allowed, sentence)}) == default
        assert sentence
    assert {*rows["task"]} == {*vrrl.TASKS}
    for task, method, profile in itertools.product(*rows.values()):
        vrrl.read_config([f"task={task}", f"method={method}", f"profile={profile}"])

def test_of_words_and_files_the_later_wins_over_rows(tmp_path):
    (tmp_path / "my.yaml").write_text("method: rl\nrl: {steps: 5, std_norm: yes}\n")
    cfg, flat = vrrl.read_config(["rl.steps=4", f"{tmp_path / 'my.yaml'}", "rl.rho=0.5"])
    assert (cfg.rl.steps, cfg.rl.std_norm, cfg.rl.rho, cfg.rl.mask) == (5, True, 0.5, "none")
    assert flat.keys() == TABLE.keys()

def test_the_sft_model_is_found_again_after_an_edit_that_sft_does_not_use(tmp_path):
    """A comment or docstring never counts; the loop, the reward and the loss do not count here."""
    source, used = (vrrl.HERE / "vrrl.py").read_text(), ["sft", "load_policy", "Grounding"]
    def name_of(old, new, names):
        assert old in source
        (tmp_path / "vrrl.py").write_text(source.replace(old, new))
        return data_prep.code_digest(tmp_path / "vrrl.py", names)
    edits = {
        "comment": ("# 2. G rollouts", "# 2. Some rollouts"),
        "docstring": ('"""Move on behind', '"""Go on behind'),
        "reward": ("0.1 + 0.9 * r", "0.2 + 0.8 * r"),
        "loop": ("abs(episode.advantage) > 1e-6", "abs(episode.advantage) > 1e-5"),
        "model": ("column <= column[past:, None]", "column < column[past:, None]"),
        "task": ("- 0.5) for middle", "- 0.4) for middle"),
        "sft": ("0.45 * math.cos", "0.4 * math.cos")}
    for names, kept in ((None, {"comment", "docstring"}),
                        (used, {"comment", "docstring", "reward", "loop"})):
        before = name_of("", "", names)
        found = {key for key, edit in edits.items() if name_of(*edit, names) == before}
        assert found == kept

@parametrize("file", ["vrrl.py", "data_prep.py"])
def test_the_program_imports_few_packages(file):
    names = []
    for node in ast.walk(ast.parse((vrrl.HERE / file).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    found = {name.partition(".")[0] for name in names}
    few = {*"torch transformers PIL tqdm yaml numpy safetensors data_prep".split()}
    assert found - sys.stdlib_module_names <= few
    assert file == "vrrl.py" or not found & {"torch", "transformers", "vrrl"}

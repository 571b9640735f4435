"""Properties of the program, the method's own first. `pytest -q`: two minutes, no network. The
models are tiny ones with random weights (`policy_of`), or one of them after some SFT steps
(`taught`), so that its conversations have several turns. VRRL_TEST_GPU=1 runs them on a GPU."""
import ast, atexit, contextlib, copy, dataclasses, functools, gc, itertools, json, math, os, random
import re, resource, shutil, signal, subprocess, sys, tempfile, time, weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

GPU = "VRRL_TEST_GPU" in os.environ
os.environ |= {"HF_HUB_OFFLINE": "1", "WORLD_SIZE": ""}
os.environ |= {} if GPU else {"CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import pytest, torch, transformers, yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import data_prep, vrrl
sys.path.insert(0, str(vrrl.HERE / "assets"))
import make_embedded

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
HOME = Path(tempfile.mkdtemp(prefix="test-vrrl-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
BASE = [f"device={'auto' if GPU else 'cpu'}", "policy.dtype=float32", "make.train=60",
        "make.traces=40", "make.test=3", "sft.batch=8", "rl.questions=8", "rl.samples=4",
        "rl.max_turns=3", "eval.max_turns=3", "points.moves=no", f"data={HOME / 'data'}"]
CONFIG = yaml.safe_load((vrrl.HERE / "config.yaml").read_text())
TABLE = vrrl.flatten(CONFIG["settings"])
LAKE = {"layout": ["SFF", "FHF", "FFG"]}  # two shortest ways, of four moves, around the hole
EXACT, KINDS = "right right down down", ("embedded", "deepstack", "qwen2.5")
BOX = {"size": [96, 96], "box": [40, 40, 56, 56], "within": 0}  # its centre is the answer 12 12

# ==================== Helpers =====================================================================
class Picture(vrrl.Picture):
    """Remembers its image, so that the library's own processor can be given it."""
    def __init__(self, image, processor):
        super().__init__(image, processor)
        self.image = image
vrrl.Picture = Picture

def settings(*words):
    return vrrl.read_config([*BASE, *words])[0]
@functools.cache
def made(name, *words):
    return vrrl.TASKS[name](settings(f"task={name}", *words))
def bare(name, *words):
    """A task without data, for given examples."""
    task = vrrl.TASKS[name].__new__(vrrl.TASKS[name])
    task.cfg = settings(f"task={name}", *words)
    return task

@functools.cache
def folder_of(kind):
    """A Hugging Face folder of a tiny model with random weights."""
    model, tokenizer, processor = make_embedded.build(0)
    torch.manual_seed(1)
    if kind == "deepstack":  # deeper visual features, as the released Qwen3-VL has them
        model.config.vision_config.deepstack_visual_indexes = [0]
        model = transformers.Qwen3VLForConditionalGeneration(model.config)
    if kind == "qwen2.5":  # with the template for images in a file of its own, as on the hub
        ids = {k: v for k, v in model.config.to_dict().items() if k.endswith("token_id") and v}
        text = dict(vocab_size=len(tokenizer) + 19, hidden_size=64, intermediate_size=96,
                    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                    rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                         mrope_section=[4, 2, 2]), initializer_range=0.1)
        vision = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14,
                      out_hidden_size=64, window_size=56, fullatt_block_indexes=[1])
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
        processor = type(processor)(
            size={"shortest_edge": 56 * 56, "longest_edge": 1 << 20}, patch_size=14, merge_size=2,
            image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
        (HOME / kind).mkdir()
        words = json.dumps({"chat_template": tokenizer.chat_template})
        (HOME / kind / "chat_template.json").write_text(words)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for part in (model, tokenizer, processor):
        part.save_pretrained(HOME / kind)
    return HOME / kind

@functools.cache
def taught():
    """The folder of a model that was shown some demonstrations of grounding, wrong answers too."""
    policy = vrrl.load_policy(folder_of("embedded"), settings("policy.temperature=1"))
    task, optimizer = made("grounding", "sft.multi_share=0.8"), vrrl.AdamW(policy)
    shown = []
    for n, (example, turns) in enumerate(task.demonstrations()):
        whole = [(taught + context, "") for taught, context in turns]
        shown.append(vrrl.demonstration(policy, task, example, whole, n))
    for step in range(1, 46):
        logps, _ = policy.log_probs(vrrl.batch_of(shown, 12, step, 0))
        (-torch.cat(logps).mean()).backward()
        optimizer.step(4e-3 * min(1, step / 8, (49 - step) / 15))
    return policy.save(HOME / "taught") or HOME / "taught"

@functools.cache
def policy_of(kind="embedded", *words):
    if kind == "taught":
        return vrrl.load_policy(taught(), settings("policy.temperature=1", *words))
    return vrrl.load_policy(folder_of(kind), settings(*words))

answer = "<ANSWER>{}</ANSWER>".format
revise = "<THINK>far</THINK><ANSWER>{}</ANSWER>".format
final = "<FINAL>{}</FINAL>".format

def said(short):
    """Texts of turns. "A 0 0; T 9 12; F" is an ANSWER, one after a THINK, and an empty FINAL."""
    forms, parts = {"A": answer, "T": revise, "F": final}, [p for p in short.split("; ") if p]
    return [forms[part[0]](part[2:]) if part[0] in forms else part for part in parts]
def parsed(task, short, last=None):
    for text in said(short):
        turn = vrrl.Turn([], [], (), *vrrl.parse_turn(task, text, last), text)
        last = turn.answer or last
        yield turn
def scripted(policy, short, start=0):
    """An episode about a training figure in which the policy says this, all of it in the loss."""
    task, turns = made("grounding"), [(text, "") for text in said(short)]
    return vrrl.demonstration(policy, task, task.examples("train")[start], turns, start)

def talkative(monkeypatch):
    """Every turn counts as an answer, so that conversations last until the turn limit."""
    points = itertools.cycle([(0, 24), (3, 4), (20, 9), (24, 0), (12, 12)])
    monkeypatch.setattr(vrrl, "read_turn", lambda p, t, e, ids, logps=(): vrrl.Turn(
        ids, [True] * len(ids), logps, "answer", "", next(points)))

def starts_of(policy, fresh, rolled=0):
    """Starts of grounding: fresh ones, then roll-ins after one or two given answers."""
    spoken = [[*policy.encode(text), policy.end_id] for text in said("A 0 24; T 1 1")]
    given = lambda n: spoken[: (1 + n % 2) * (n >= fresh)]
    return [vrrl.begin(policy, made("grounding"), example, n, given(n)) for n, example
            in enumerate(made("grounding").examples("train")[: fresh + rolled])]

def sampled(policy, fresh=5, rolled=2, samples=2, turns=3, **options):
    """Sampled episodes; the last `rolled` starts are roll-ins."""
    starts = starts_of(policy, fresh, rolled)
    luck = vrrl.uniforms(policy, [str(n) for n in range(len(starts))], samples, turns)
    return vrrl.play(policy, made("grounding"), starts, samples, turns, luck, **options)

def library_rows(policy, episode):
    """(log-probs (N, V) of what could have been said, ids (N,) of what was) at each action, from
    one plain forward of the library over all of an episode."""
    (head, first), (rest, later) = episode.opening, episode.rest
    ids = torch.tensor([[*head, *rest]], device=policy.device)
    seen = policy.processor(images=[p.image for p in (*first, *later)], return_tensors="pt")
    logits = policy.model(input_ids=ids, mm_token_type_ids=ids.eq(policy.image_id).int(),
                          use_cache=False, **seen.to(policy.device)).logits[0].float()
    logits = (logits / policy.cfg.policy.temperature).masked_fill(policy.banned, -torch.inf)
    at = torch.tensor([len(head) + column for column, _ in episode.actions], device=policy.device)
    return logits[at - 1].log_softmax(-1), ids[0, at]

def library_log_probs(policy, episode):
    logp, ids = library_rows(policy, episode)
    return logp.gather(1, ids[:, None])[:, 0]
def furthest(one, other):
    """Largest difference between two lists of tensors of the same shapes."""
    one, other = ([torch.as_tensor(x).detach().cpu() for x in part] for part in (one, other))
    assert [x.shape for x in one] == [x.shape for x in other]
    return max((a - b).abs().max().item() for a, b in zip(one, other) if a.numel())

def gradients(policy):
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found
def assert_same_gradients(one, other):
    assert one and one.keys() == other.keys()
    most = max(g.abs().max().item() for g in one.values())
    assert most > 0 and furthest(one.values(), other.values()) < 1e-4 * most
def leaf(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng).requires_grad_()
def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]

@pytest.fixture
def fails(capsys, monkeypatch):
    """Run a command that must fail as a user's mistake; gives its one line."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    def run(function, words=()):
        with pytest.raises(SystemExit) as stop:
            vrrl.run_main(function, words)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("error: "), line
        return line
    return run

# ==================== The method: loss ============================================================
@pytest.mark.parametrize("group, kept", [(2, 1), (3, 1), (2, 2)])
def test_expected_gradient_of_the_loss_is_that_of_the_expected_reward(group, kept):
    """Two turns, all groups of rollouts enumerated; turns before `kept` are masked in each."""
    logits = leaf(3, seed=1), leaf(3, 2, seed=2)
    rewards = torch.tensor([[1.0, 0.2], [0.0, 0.7], [0.1, 0.4]], dtype=torch.float64)
    first, second = (x.log_softmax(-1) for x in logits)
    paths = {(a, b): torch.stack([first[a], second[a, b]]) for a in range(3) for b in range(2)}
    value = sum(logp.sum().exp() * rewards[path] for path, logp in paths.items())
    truth = list(torch.autograd.grad(value, logits, retain_graph=True))
    truth[0] = truth[0] * (kept == 1)
    mask, mean = [float(kept == 1), 1.0], 0.0
    for chosen in itertools.product(paths, repeat=group):
        advantage = vrrl.advantages(torch.stack([rewards[path] for path in chosen])[None])[0]
        logps = [paths[path] for path in chosen]
        episodes = [SimpleNamespace(advantage=a, weights=mask) for a in advantage.tolist()]
        loss = vrrl.policy_loss(episodes, logps, group)
        mean = mean - sum(logp.sum() for logp in logps).exp().detach() * loss
    assert furthest(torch.autograd.grad(mean, logits), truth) < 1e-6

@pytest.mark.parametrize("words", [[], ["rl.mask=expected", "rl.kl=0.3"], [
    "rl.mask=none", "rl.std_norm=yes"], ["policy.freeze_vision=no", "rl.kl=0.3"]], ids=" ".join)
def test_an_rl_step_takes_the_gradient_of_the_methods_loss(tmp_path, monkeypatch, words):
    """Against the loss written anew over plain forwards of the library, rollout by rollout. The KL
    term holds on masked turns too."""
    cfg = settings("rl.steps=3", "rl.questions=6", "rl.samples=3", "rl.rho=0.2", "policy.micro=5",
                   "policy.temperature=1", "buffer.correct_share=0", *words)
    policy, play, played, taken = vrrl.load_policy(taught(), cfg), vrrl.play, [], []
    reference = vrrl.load_policy(folder_of("embedded"), cfg) if cfg.rl.kl else None
    policy.reference = reference
    monkeypatch.setattr(vrrl, "play", lambda *a, **k: played.append(play(*a, **k)) or played[-1])
    monkeypatch.setattr(vrrl, "reward", lambda task, e, **n: sum(e.rest[0]) % 7 / 10)
    monkeypatch.setattr(vrrl.AdamW, "step", lambda self, lr: taken.append(gradients(policy)) or 0.0)
    vrrl.rl(policy, made("grounding"), cfg, vrrl.Run(tmp_path, {}))
    assert sum(bool(e.given) for e in played[1] + played[2]) > 3
    for episodes, found in zip(played, taken):
        loss = 0.0
        for e in episodes:
            group = [other.reward for other in episodes if other.start == e.start]
            advantage = e.reward - (sum(group) - e.reward) / 2
            advantage /= np.std(group, ddof=1) + 1e-6 if cfg.rl.std_norm else 1
            logp, turn = library_log_probs(policy, e), [number for _, number in e.actions]
            first = turn[e.weights.index(1.0)]  # k
            assert e.weights == {"none": [1.0 for t in turn], "expected": [
                t / turn[-1] for t in turn], "random": [float(t >= first) for t in turn]}[
                    "none" if e.given else cfg.rl.mask]
            weight = torch.tensor(e.weights, device=policy.device)
            loss = loss - advantage * (weight * logp).sum() / 18
            if reference and abs(advantage) > 1e-6:
                gap = library_log_probs(reference, e).detach() - logp
                loss = loss + cfg.rl.kl * (gap.exp() - gap - 1).sum() / 18
        loss.backward()
        assert_same_gradients(found, gradients(policy))
    masked = [0.0 in e.weights for e in sum(played, []) if len(e.turns) > 1 and not e.given]
    assert (0 < sum(masked) < len(masked)) == (cfg.rl.mask == "random")

def test_random_masking_drops_the_turns_before_a_uniform_k_and_expected_is_its_average():
    turns = [vrrl.Turn([1] * n, [True] * n) for n in (2, 3, 1, 2)]
    episode = vrrl.Episode({}, [], None, turns=turns)
    group = [episode] * 4000
    drawn = Counter(map(tuple, vrrl.turn_weights(group, "random", "seed")))
    turns = [1, 1, 2, 2, 2, 3, 4, 4]
    assert set(drawn) == {tuple(float(t >= k) for t in turns) for k in (1, 2, 3, 4)}
    assert all(abs(count - 1000) < 130 for count in drawn.values())
    assert vrrl.turn_weights(group, "random", "seed") != vrrl.turn_weights(group, "random", "other")
    (expected,) = vrrl.turn_weights([episode], "expected", "seed")
    assert expected == pytest.approx(np.mean([*drawn], 0))
    episode.given = episode.turns[:1]  # a roll-in is not masked
    for mask in ("none", "random", "expected"):
        assert vrrl.turn_weights([episode], mask, "seed") == [[1.0] * 8]

def test_given_turns_and_feedback_are_never_in_the_loss():
    policy = policy_of("taught")
    for e in sampled(policy):
        assert [e.rest[0][c] for c, _ in e.actions] == [i for t in e.turns for i in t.ids]
        assert len(e.sampled_logps) == len(e.actions)

def test_a_step_without_any_advantage_moves_no_weight(tmp_path, monkeypatch):
    """Adam's momentum of the step before would move it."""
    cfg, paid = settings("rl.steps=2", "rl.rho=1", "policy.temperature=1"), []
    policy, seen = vrrl.load_policy(taught(), cfg), []
    def pay(task, episode, **numbers):  # in the first step rewards differ, in the second none does
        paid.append(episode)
        return sum(episode.rest[0]) % 7 / 10 if len(paid) <= 32 else 1.0
    monkeypatch.setattr(vrrl, "reward", pay)
    monkeypatch.setattr(vrrl, "health", lambda outcomes: seen.append(
        [p.detach().clone() for p in policy.model.parameters()]) or {})
    before = [p.detach().clone() for p in policy.model.parameters()]
    assert vrrl.rl(policy, made("grounding"), cfg, vrrl.Run(tmp_path, {})) == 1
    assert furthest(before, seen[0]) > 0 and furthest(seen[0], seen[1]) == 0
    assert [line["skipped"] for line in lines_of(tmp_path)] == [0, 1]

def test_the_baseline_is_the_mean_of_the_others_and_equal_rewards_have_no_advantage():
    rewards = leaf(3, 4).detach()
    found = vrrl.advantages(rewards)
    assert furthest([found], [[[r - (row.sum() - r) / 3 for r in row] for row in rewards]]) < 1e-12
    scaled = vrrl.advantages(rewards, std_norm=True)
    assert furthest([scaled], [found / rewards.std(1, keepdim=True)]) < 1e-4
    for n, std_norm in itertools.product(range(100), (False, True)):  # in fp32, as `rl` makes them
        assert vrrl.advantages(torch.full((1, 8), n / 99), std_norm).abs().max() < 1e-6

# ==================== The method: reward ==========================================================
# Progress by hand, s1 = 19.2 and s2 = 48 pixels: "9 12" is 12 pixels from the centre, so that
# p = (e^-0.390625 + e^-0.0625) / 2 = 0.808023; "0 0" is 67.88, p = (e^-12.5 + e^-2) / 2 = 0.067669.
GROUNDING = [("A 12 12; F", 1.0), ("A 0 0; F", 0.1), ("A 0 0; T 9 12; F", 0.1 + 0.9 * 0.740354),
    ("A 9 12; T 0 0; F", 0.1), ("A 0 0; T 9 12; T 24 24; F", 0.1), ("A 0 0; T 12 12; F", 0.95),
    ("A 12 12; T 0 0; F", 0.1), ("A 0 0; T 12 12", 0.0), ("A 12 12; so it is; F", 0.0)]
# Bonus 0.2, a cost of 0.05 a turn, half weight for what makes it worse, 0.05 off a right answer for
# each revision. Progress: right 1/4, right right 1/2, right right down 3/4, up and left 0.
NAVIGATION = [(f"A {EXACT}; F", 1.0), (f"A up; T {EXACT}; F", 0.1 + 0.9 + 0.2 - 0.15 - 0.05),
    (f"A right right; T {EXACT}; F", 0.95), (f"A up; T {EXACT}", 0.0), ("A right; T right; F", 0.0),
    (f"A up; T right right down; T left; T {EXACT}; F", 0.85),  # r is clipped at one
    ("A right; F", 0.0), ("A right; T right right down; F", 0.1 + 0.9 * 0.5 - 0.15),
    ("A right right; T left; T right right down; F", 0.1 + 0.9 * 0.5 - 0.2),
    (f"A {EXACT}; T right; F", 0.0), ("A up; T right; F", 0.325, "reward.cost=0"),
    ("A right; F", 0.08, "reward.cost=0.01"), (f"A up; T {EXACT}; F", 1.3, "reward.bonus=0.5"),
    ("A right right; T left; T right right down; F", 0.325, "reward.cost=0", "reward.worse=1"),
    ("A right right; T left; T right right down; F", 0.775, "reward.cost=0", "reward.worse=0")]

def reward_of(task, texts, given=0):
    turns, example = [*parsed(task, texts)], LAKE if task.cfg.task == "navigation" else BOX
    episode = vrrl.Episode(example, [], None, given=turns[:given], turns=turns[given:])
    return vrrl.reward(task, episode, **vars(task.cfg.reward))

@pytest.mark.parametrize("row", [*GROUNDING, *NAVIGATION], ids=str)
def test_the_reward_is_what_its_docstring_says(row):
    texts, expected, *words = row
    name = "grounding" if row in GROUNDING else "navigation"
    paid = [reward_of(bare(name, *words), texts, given) for given in range(1 + texts.count("; "))]
    assert paid == [pytest.approx(expected, abs=1e-5)] * len(paid)  # given answers count as well
    assert reward_of(bare(name, "reward.reflection=no"), texts) == float(expected > 0.8)

@pytest.mark.parametrize("texts, lost", [  # after how many turns nothing can mend it
    ("A 0 0; F", None), ("A 0 0; F 0 0", None), ("A 0 0; T 1 1; T 2 2; F 2 2", None),
    ("A 0 0; T 1 1; F  \n", None), ("", 9), ("A 0 0", 9), ("A 0 0; T 1 1", 9),  # no FINAL
    ("F", 1), ("F 0 0", 1), ("T 0 0; F", 1), ("A 0 0; A 1 1; F", 2),  # THINK in turn 1 or in none
    ("A 0 0; T 0 0; F", 2), ("A 0 0; T 1 1; T 0 0; F", 3),  # repeats
    ("A 0 0; F 1 1", 2), ("A 0 0; T 1 1; F 0 0", 3),  # a FINAL for another answer
    ("A 0 0; <THINK>here</THINK><FINAL></FINAL>", 2), ("A 0 0; F; F", 3), ("A 0 0; F; T 1 1", 3),
    ("A 0 0; so", 2), ("so; F", 1), ("A 0 0; <THINK>x</THINK>; F", 2)])
def test_well_formed_is_what_the_protocol_says(texts, lost):
    task = bare("grounding")
    turns, fine = [*parsed(task, texts)], functools.partial(vrrl.well_formed, task)
    assert fine(turns) == (lost is None) == (reward_of(task, texts) > 0)
    assert [fine(turns[:n], unfinished=True) for n in range(len(turns) + 1)] == [
        n < (lost or 9) for n in range(len(turns) + 1)]

# ==================== The method: buffer ==========================================================
def buffer_of(*words):
    cfg = settings(*words).buffer
    return vrrl.Buffer(cfg.size, cfg.correct_share)

def test_the_buffer_is_two_queues_first_in_first_out_of_the_settings_sizes():
    buffer, rng = buffer_of("buffer.size=10", "buffer.correct_share=0.3"), random.Random(0)
    [buffer.add((n // 2 + 100 * (n % 2), [], n % 2 == 1)) for n in range(40)]
    kept = [*range(13, 20)], [117, 118, 119]
    assert tuple([s[0] for s in queue] for queue in (buffer.wrong, buffer.correct)) == kept
    taken = [state[0] for state in (buffer.take(rng) for _ in range(100)) if state]
    assert ([n for n in taken if n < 100], [n for n in taken if n > 99]) == kept  # once, in order
    assert buffer.take(rng) is None
    for share in (0.0, 0.3, 0.8, 1.0):
        buffer = buffer_of("buffer.size=9000", f"buffer.correct_share={share}")
        [buffer.add((n, [], n % 2 == 0)) for n in range(4000)]
        taken = [state[2] for state in (buffer.take(rng) for _ in range(2000)) if state]
        assert abs(np.mean(taken) - share) < 0.04

@pytest.mark.parametrize("store, texts, cut, right", [
    ("drawn", "W F", 1, False), ("drawn", "R F", 1, True), ("drawn", "W R F", 1, False),
    ("drawn", "R W R F", 2, False), ("drawn", "W W F", 1, False), ("drawn", "R W", 1, True),
    ("drawn", "R bad", 1, True), ("drawn", "W", 0, None), ("drawn", "F", 0, None),
    ("committed", "W F", 1, False), ("committed", "R F", 1, True), ("committed", "W R F", 2, True),
    ("committed", "W W F", 2, False), ("committed", "R W", 0, None),
    ("committed", "W bad", 0, None), ("committed", "W R other", 0, None)])
def test_the_stored_state_is_cut_where_the_policy_had_to_decide(store, texts, cut, right):
    """W and R: a wrong and the right answer; F: a FINAL. The last turn was not shown."""
    policy, task, wrong = policy_of(), made("grounding"), iter(("0 24", "24 0", "0 0"))
    example, short = task.examples("train")[0], ""
    for letter in texts.split():
        text = task.say(task.solution(example)) if letter == "R" else next(wrong, "")
        short += {"F": "F; ", "bad": "up; ", "other": "F 5 20; "}.get(
            letter, ("T " if short else "A ") + text + "; ")
    episode = scripted(policy, short)
    state = vrrl.state_of(task, episode, store)
    assert state == ((example["id"], [t.ids for t in episode.turns[:cut]], right) if cut else None)
    rolled = dataclasses.replace(episode, given=episode.turns[:1], turns=episode.turns[1:])
    assert vrrl.state_of(task, rolled, store) is None  # states would grow out of states

def test_a_state_starts_with_the_same_ids_and_pictures():
    policy, task, found = policy_of("taught"), made("grounding"), 0
    questions = {e["id"]: e for e in task.examples("train")}
    for e in sampled(policy, fresh=8, rolled=0, samples=4, training=True):
        if (state := vrrl.state_of(task, e, "drawn")) is None:
            continue
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
        start, cut = vrrl.begin(policy, task, questions[state[0]], 77, state[1]), len(state[1])
        ids, pictures = start.opening
        assert ids == [*e.question_ids, *(i for t in e.turns[:cut] for i in (*t.ids, *t.reply))]
        before = [e.question_picture, *(t.picture for t in e.turns[:cut])]
        assert [p.image.tobytes() for p in pictures] == [p.image.tobytes() for p in before]
        assert (start.turns, start.start, start.answers) == ([], 77, e.answers[:cut])
        assert state[2] == task.exact(e.example, e.answers[cut - 1])
        found += 1
    assert found > 8

# ==================== The method: SFT =============================================================
@pytest.mark.parametrize("words", ["grounding", "grounding points.moves=yes", "navigation"])
def test_of_a_demonstration_thoughts_and_right_answers_are_taught_and_wrong_ones_never(words):
    policy, task, lengths = policy_of(), made(*words.split()), Counter()
    for example, turns in task.demonstrations():
        e = vrrl.demonstration(policy, task, example, turns, 0)
        right = [task.exact(example, a) for a in e.answers]
        assert vrrl.well_formed(task, e.turns) and right == [False] * (len(right) - 1) + [True]
        for (taught, context), turn, ok in zip(turns, e.turns, [*right, True]):
            text = taught + context
            think = text[: text.index("</THINK>") + 8] if "</THINK>" in text else ""
            assert taught == (text if ok else think)
            ids = [*policy.encode(text), policy.end_id]
            may = len(ids) if ok else len(policy.encode(think))
            assert turn.ids == ids and turn.loss_tokens == [n < may for n in range(len(ids))]
        for before, turn in zip(e.turns, e.turns[1:-1]):
            assert turn.thought.strip() == task.thought(example, before.answer)
            assert task.say(turn.answer, before.answer) in turn.text
        assert (turns[-1] == [final(""), ""]) == (words != "navigation")
        lengths[len(right)] += 1
    assert lengths[1] == pytest.approx(20, abs=9) and len(lengths) > 3 and max(lengths) <= 5

def test_sft_teaches_first_answers_then_demonstrations_by_mean_log_prob(tmp_path, monkeypatch):
    cfg = settings("sft.first_steps=6", "sft.steps=6", "sft.lr=0.004", "policy.micro=5")
    policy = vrrl.load_policy(folder_of("embedded"), cfg)
    seen, log_probs = [], policy.log_probs
    monkeypatch.setattr(policy, "log_probs", lambda episodes: seen.append((episodes, [
        library_log_probs(policy, e).detach() for e in episodes])) or log_probs(episodes))
    vrrl.sft(policy, made("grounding"), cfg, vrrl.Run(tmp_path, {}))
    lines = lines_of(tmp_path)
    assert [(m["stage"], m["step"]) for m in lines] == [
        (stage, n) for stage in ("first", "sft") for n in range(1, 7)]
    for line, one, two in zip(lines, seen[::2], seen[1::2], strict=True):  # two micro-batches
        expected = -torch.cat([*one[1], *two[1]]).mean().item()
        assert line["loss"] == pytest.approx(expected, abs=1e-4)
        for e in one[0] + two[0] if line["stage"] == "first" else ():
            (turn,) = e.turns
            assert turn.kind == "answer" and turn.thought is None and all(turn.loss_tokens)
            assert made("grounding").exact(e.example, turn.answer)
    assert {len(e.turns) for episodes, _ in seen[12:] for e in episodes} >= {2, 3}
    assert lines[5]["loss"] < 0.7 * lines[0]["loss"] and lines[5]["lr"] == pytest.approx(0.0004)

@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_alone_and_are_merged_on_save(kind, tmp_path):
    policy, plain = policy_of(kind, "policy.lora=4"), policy_of(kind)
    episodes, optimizer = [scripted(plain, "A 0 24; T 9 9; F")], vrrl.AdamW(policy)
    before = [t.clone() for t in plain.model.state_dict().values()]
    for _ in range(3):
        (-torch.cat(policy.log_probs(episodes)[0]).sum()).backward()
        optimizer.step(0.02)
    assert sum(p.numel() for p in optimizer.weights) < 0.2 * sum(t.numel() for t in before)
    trained = torch.cat(policy.log_probs(episodes)[0])
    off = torch.cat(policy.reference_log_probs(episodes))  # the model that the KL term is to
    assert torch.allclose(off, torch.cat(plain.log_probs(episodes)[0]), atol=1e-5)
    assert (trained - off).abs().max() > 0.1
    again = vrrl.load_policy(policy.save(tmp_path / "a") or tmp_path / "a", settings())
    assert torch.allclose(trained, torch.cat(again.log_probs(episodes)[0]), atol=1e-4)

def test_every_pass_over_the_items_is_whole_and_in_a_new_order():
    taken = itertools.chain(*(vrrl.batch_of("abcdefgh", 3, step, 0) for step in range(1, 9)))
    passes = [*zip(*[taken] * 8)]
    assert all(sorted(one) == list("abcdefgh") for one in passes) and len(set(passes)) == 3

# ==================== Policy ======================================================================
@pytest.mark.parametrize("kind", ["taught", *KINDS])
def test_log_probs_of_sampling_and_training_are_the_librarys(kind, monkeypatch):
    """Their entropies too; and greedy play says what is likeliest."""
    policy = policy_of(kind)
    kind == "taught" or talkative(monkeypatch)
    episodes = sampled(policy)
    assert max(len(e.turns) for e in episodes) == 3 and any(e.given for e in episodes)
    recorded = [[p for t in e.turns for p, m in zip(t.logps, t.loss_tokens) if m] for e in episodes]
    logps, entropies = policy.log_probs(episodes)
    assert furthest(logps, recorded) < 2e-4
    assert furthest(logps, [library_log_probs(policy, e) for e in episodes]) < 1e-4
    rows = [library_rows(policy, e)[0][:, ~policy.banned] for e in episodes]
    assert furthest(entropies, [-(logp.exp() * logp).sum(-1) for logp in rows]) < 1e-3
    for e in vrrl.play(policy, made("grounding"), starts_of(policy, 3), 1, 3):  # greedy
        logp, ids = library_rows(policy, e)
        assert torch.equal(logp.argmax(-1), ids)

@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_patches_and_features_of_mixed_pictures_equal_the_librarys(kind, monkeypatch):
    policy, rng, given = policy_of(kind), np.random.default_rng(0), []
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
              for w, h in ((96, 96), (90, 61), (33, 300), (160, 96), (96, 96))]
    pictures = [vrrl.Picture(image, policy.processor) for image in images]
    seen, tower = policy.processor(images=images), policy.model.model.get_image_features
    patches, grids = (torch.tensor(x, device=policy.device) for x in seen.values())
    out = tower(patches, grids, return_dict=True)
    monkeypatch.setattr(policy.model.model, "get_image_features",
                        lambda x, grid, **k: given.extend(x.tolist()) or tower(x, grid, **k))
    found = policy.encode_pictures([*pictures, pictures[0]])
    assert furthest([sorted(given)], [sorted(patches.tolist())]) < 1e-5  # pictures in any order
    assert furthest([f for f, _ in found], [*out.pooler_output, out.pooler_output[0]]) < 1e-5
    assert bool(found[0][1]) == (kind == "deepstack")
    if found[0][1]:
        deep = [x if torch.is_tensor(x) else torch.cat([*x]) for x in out.deepstack_features]
        assert furthest([torch.cat(x) for x in zip(*(d for _, d in found[:5]))], deep) < 1e-5

def test_only_plain_tokens_and_the_end_of_a_turn_are_sampled():
    policy = policy_of("qwen2.5", "policy.temperature=10")
    banned = policy.encode("<|image_pad|> <|video_pad|> <|im_start|> <|endoftext|>")
    banned += range(len(policy.tokenizer), len(policy.banned))
    logp = policy.log_softmax(torch.randn(3, 64, device=policy.device))
    words = [policy.end_id, *(i for word in vrrl.TAGS for i in policy.encode(word))]
    assert torch.isneginf(logp[:, banned]).all() and torch.isfinite(logp[:, words]).all()
    assert len(banned) == 4 + 19

@torch.no_grad()
def test_sampled_tokens_follow_their_probabilities():
    policy, count = policy_of("embedded", "policy.temperature=3", "policy.max_new=4"), 400
    context = vrrl.Context(1, policy.device)
    policy.read(context, [starts_of(policy, 1)[0].opening])
    chance = policy.log_softmax(context.last)[0].exp().tolist()
    context.take([0] * count)
    luck = torch.full((count, 4), 0.5, dtype=torch.float64, device=policy.device)
    luck[:, 0] = torch.arange(count) / count
    drawn = Counter(ids[0] for ids, _ in policy.sample(context, luck))
    assert len(drawn) > 9 and all(abs(drawn[i] - p * count) < 1.01 for i, p in enumerate(chance))
    assert not policy.banned[[*drawn]].any()  # not even where the number is 0

def test_a_rollout_depends_neither_on_its_neighbours_nor_on_their_order():
    def played(order, *words):
        policy = policy_of("taught", *words)
        starts, luck = starts_of(policy, 3, 2), vrrl.uniforms(policy, [str(n) for n in order], 2, 3)
        found = vrrl.play(policy, made("grounding"), [starts[n] for n in order], 2, 3, luck)
        return {(e.start, n % 2): [t.ids for t in e.turns] for n, e in enumerate(found)}

    whole = played(range(5))
    assert played([4, 2, 0, 3, 1]) == played(range(5), "policy.rows=3") == whole
    assert played([2]) == {key: ids for key, ids in whole.items() if key[0] == 2}
    assert whole[0, 0] != whole[0, 1]

def test_training_play_ends_where_the_reward_is_lost_and_every_answer_is_shown(monkeypatch):
    policy, task, texts = policy_of(), made("grounding"), iter(["A 0 0", "A 1 1"] * 4)
    (begun,) = starts_of(policy, 1)
    monkeypatch.setattr(vrrl, "read_turn", lambda p, task, *rest: next(parsed(task, next(texts))))
    assert len(vrrl.play(policy, task, [begun], 1, 4, None, training=True)[0].turns) == 2
    (free,) = vrrl.play(policy, task, [begun], 1, 4)  # its second answer has no THINK
    assert len(free.turns) == 4 and free.turns[3].picture is None and not begun.turns
    assert all(t.picture.image == task.feedback(begun.example, t.answer) for t in free.turns[:3])

@pytest.mark.parametrize("kind, frozen", [*itertools.product(KINDS, ("yes", "no"))])
def test_checkpointing_and_shared_openings_change_no_gradient(kind, frozen, monkeypatch):
    def gradients_of(episodes):
        logps, _ = policy.log_probs(episodes)
        sum((n + 1) * logp.sum() for n, logp in enumerate(logps)).backward()
        return gradients(policy)

    words, runs = f"policy.freeze_vision={frozen}", Counter()
    policy = vrrl.load_policy(folder_of(kind), settings(words))
    talkative(monkeypatch)
    episodes = sampled(policy, 2, 2, 2, 2)
    plain = gradients_of(episodes)
    assert any("visual" in name for name in plain) == (frozen == "no")
    apart = [dataclasses.replace(e, start=n) for n, e in enumerate(episodes)]
    assert_same_gradients(plain, gradients_of(apart))
    monkeypatch.setattr(vrrl, "is_large", lambda model: True)
    policy = vrrl.load_policy(folder_of(kind), settings(words))
    for layer in policy.model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, *rest: runs.update([mlp]))
    assert_same_gradients(plain, gradients_of(episodes))
    assert min(runs.values()) >= 4  # opening and rest, forwards and once more

@pytest.mark.parametrize("words, large", [((), False), ((), True), (("policy.lora=4",), True)])
def test_dropping_a_policy_frees_its_weights(words, large, monkeypatch):
    """Without the garbage collector, which may come late: two real models do not fit a card."""
    monkeypatch.setattr(vrrl, "is_large", lambda model: large)
    policy = vrrl.load_policy(folder_of("deepstack"), settings(*words))
    sum(logp.sum() for logp in policy.log_probs(sampled(policy, 2, 1))[0]).backward()
    weights = [weakref.ref(p) for p in policy.model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del policy
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()

@pytest.mark.parametrize("temperature", [0.05, 1, 10])
def test_equal_rollouts_share_rows_and_nothing_else_changes(temperature, monkeypatch):
    """At a low temperature nearly all are equal, at a high one none are."""
    policy = policy_of("taught", f"policy.temperature={temperature}")
    def gradients_of(episodes):
        found = policy.log_probs(episodes)
        sum((n + 1) * logp.sum() for n, logp in enumerate(found[0])).backward()
        return found, gradients(policy)

    together = sampled(policy, 3, 2, 4)
    (logps, entropies), shared = gradients_of(together)
    rows = len({(e.start, *e.rest[0]) for e in together})
    assert rows < 8 if temperature < 1 else rows == 20 if temperature > 1 else 5 < rows < 20
    keys, group = itertools.count(), vrrl.Context.group
    monkeypatch.setattr(vrrl.Context, "group", lambda self, keys_: apart(self, keys_))
    def apart(self, keys_):  # each conversation has a row of its own
        found = group(self, [(row, (said, next(keys))) for row, said in keys_])
        return [(row, said) for row, (said, _) in found]
    alone = sampled(policy, 3, 2, 4)
    assert [[t.ids for t in e.turns] for e in alone] == [[t.ids for t in e.turns] for e in together]
    (logps_alone, entropies_alone), unshared = gradients_of(alone)
    assert furthest(logps, logps_alone) < 1e-4 and furthest(entropies, entropies_alone) < 1e-3
    assert_same_gradients(shared, unshared)

@pytest.mark.parametrize("kind, system", [*itertools.product(KINDS, ("", "find the way"))])
def test_a_conversation_has_the_ids_of_the_chat_template_and_tags_stand_apart(kind, system):
    policy, task = policy_of(kind, f"policy.system={system}"), made("grounding")
    for number, short in enumerate(("A 3 4; F", "A 3 4; T 24 0; F", "F")):
        e = scripted(policy, short, number)
        text = [{"type": "text", "text": text} for text in (*task.question(e.example), system)]
        talk, image = [{"role": "system", "content": text[2:]}] * bool(system), {"type": "image"}
        for n, turn in enumerate(e.turns):
            talk.append({"role": "user", "content": [image, text[1]] if n else [text[0], image]})
            talk.append({"role": "assistant", "content": [{"type": "text", "text": turn.text}]})
        parts = policy.tokenizer.apply_chat_template(talk, tokenize=False).split("<|image_pad|>")
        (head, first), (rest, later) = e.opening, e.rest
        sizes = [*(math.prod(p.grid) for p in (*first, *later)), 0]
        whole = "".join(part + "<|image_pad|>" * size for part, size in zip(parts, sizes))
        assert [*head, *rest] == policy.tokenizer.encode(whole, add_special_tokens=False)
    assert vrrl.read_turn(policy, task, e, policy.encode(answer("1 2"))).kind == "bad"  # cut off
    apart = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, **k: [text]))
    assert vrrl.Policy.encode(apart, "<THINK>a>b</THINK>") == ["<THINK>", "a>b", "</THINK>"]

# ==================== AdamW =======================================================================
def stepped(module, kind, rates, scale=1.0):
    """The weights after a step at each rate; the gradient is scale * (1 + half a random number)."""
    rng, module = torch.Generator().manual_seed(0), copy.deepcopy(module)
    ours = vrrl.AdamW(SimpleNamespace(model=module))
    theirs = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for rate in rates:
        for p in module.parameters():
            p.grad = scale * (1 + torch.randn(p.shape, generator=rng) / 2).to(p.dtype)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0 if kind == "theirs" else math.inf)
        theirs.param_groups[0]["lr"] = rate
        ours.step(rate) if kind == "ours" else theirs.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])

@pytest.mark.parametrize("scale", [0.001, 3.0], ids=["below the clip", "clipped"])
def test_adamw_equals_torchs_in_fp32(scale):
    module, rates = torch.nn.Linear(9, 7), [1e-3 * (1 + n % 3) for n in range(20)]
    ours, theirs = (stepped(module, kind, rates, scale) for kind in ("ours", "theirs"))
    assert furthest([ours], [theirs]) < 1e-6
    assert furthest([ours], [stepped(module, "ours", [])]) > 1e-2

def test_in_bf16_updates_too_small_for_it_add_up_as_in_fp32():
    torch.manual_seed(0)
    module, rates = torch.nn.Linear(64, 64, bias=False).bfloat16(), [1e-5] * 300
    start = stepped(module, "ours", []).float()
    ours, plain = (stepped(module, kind, rates).float() - start for kind in ("ours", "theirs"))
    true = stepped(module.float(), "ours", rates) - start
    assert abs(plain.mean()) < 0.2 * abs(true.mean())  # rounded away
    assert ours.mean().item() == pytest.approx(true.mean().item(), rel=0.1)

def test_a_step_that_is_not_finite_changes_nothing():
    module = torch.nn.Linear(3, 2)
    optimizer, before = vrrl.AdamW(SimpleNamespace(model=module)), copy.deepcopy(module)
    (module(torch.ones(3)).sum() * math.nan).backward()
    assert not math.isfinite(optimizer.step(0.1))
    assert furthest(module.parameters(), before.parameters()) == 0

# ==================== Tasks =======================================================================
@pytest.mark.parametrize("text, exact, near, thought", [
    ("12 12", True, 1.0, "here"), ("10 10", True, 0.826304, "right 2 down 2"),
    ("14 12", False, 0.906614, "left 2"), ("12 14", False, 0.906614, "up 2"),
    ("7 13", False, 0.579167, "right 5 up 1"), ("6 12", False, 0.494206, "far")])
def test_pointing_by_hand(text, exact, near, thought):
    """The box 40..56 has its centre at 48; an answer stands for 4 pixels, a crop has 48."""
    task = bare("grounding")
    point = task.parse(text)
    assert task.exact(BOX, point) == exact and task.thought(BOX, point) == thought
    assert task.progress(BOX, point) == pytest.approx(near, abs=1e-6)
    assert task.pixel(BOX, point) == (4 * point[0], 4 * point[1]) and task.solution(BOX) == (12, 12)

def test_pointing_settings_and_edges():
    task, real = bare("grounding"), bare("grounding", "points.scale=1000", "points.crop=200")
    for text, new in (("306 407", False), ("306 408", True)):  # a jitter is a repetition
        assert vrrl.well_formed(real, [*parsed(real, f"A 300 400; T {text}; F")]) == new
    image = {"size": [400, 300], "box": [100, 100, 140, 120], "within": 0}
    assert real.pixel(image, (500, 500)) == (200, 150) and real.solution(image) == (300, 367)
    near = {**image, "within": 40}  # pixels from the centre (120, 110), not the box
    assert [real.exact(near, (x, 367)) for x in (300, 390, 410)] == [True, True, False]
    assert [real.exact(image, (x, 367)) for x in (250, 349, 350)] == [True, True, False]
    expected = (math.exp(-1) + math.exp(-0.16)) / 2  # paper: s1 = 80, s2 = 200; 80 pixels away
    assert real.progress({**image, "box": [40, 75, 40, 75]}, (300, 250)) == pytest.approx(expected)
    shown = [task.thought(BOX, task.mistake(BOX, random.Random(n))) != "far" for n in range(400)]
    assert 0.45 < np.mean(shown) < 0.8  # half are near on purpose

def test_with_scale_0_an_answer_is_a_pixel_of_the_picture_as_the_model_sees_it():
    task = bare("grounding", "points.scale=0", f"model={folder_of('qwen2.5')}")
    example = {"size": [96, 150], "box": [48, 75, 60, 90], "within": 0}
    down, across = vrrl.Picture(Image.new("RGB", (96, 150)), policy_of("qwen2.5").processor).grid
    assert task.ends(example) == (28 * across, 28 * down) == (84, 140) == task.parse("84 140")
    assert task.pixel(example, (42, 70)) == (48, 75) and task.exact(example, task.solution(example))

@pytest.mark.parametrize("moves, outcome, progress", [
    (EXACT, "exact", 1), ("right left right right down down", "longer", 0.25),
    (EXACT + " up down", "past", 0), (EXACT + " down", "edge", 0), ("up " + EXACT, "edge", 0),
    ("right down down right", "hole", 0.25), ("right right down", "short", 0.75)])
def test_a_walk_by_hand(moves, outcome, progress):
    task = bare("navigation")
    way = task.parse(f" {moves.replace(' ', ', ').upper()}\n")
    assert way == tuple(moves.split()) and task.exact(LAKE, way) == (outcome == "exact")
    assert outcome == "exact" or task.thought(LAKE, way) == outcome
    assert task.progress(LAKE, way) == progress
    assert not any(map(task.parse, ("", " , ", "north", "up1", "up;left", "٣ up")))

STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
def least(layout):
    """{cell: least moves to the goal} of the cells with a way: a search of its own."""
    cells = {(row, column): kind for row, kinds in enumerate(layout)
             for column, kind in enumerate(kinds) if kind != "H"}
    left = {at: 0 for at, kind in cells.items() if kind == "G"}
    for steps in range(len(cells)):
        left |= {(r, c): steps + 1 for r, c in cells.keys() - left.keys() if any(
            left.get((r + down, c + right)) == steps for down, right in STEPS.values())}
    return left
def start_of(layout):
    return divmod("".join(layout).index("S"), len(layout[0]))

def test_walks_agree_with_a_search_of_its_own():
    task, rng, seen = bare("navigation"), random.Random(0), Counter()
    while sum(seen.values()) < 1000:
        rows, columns = rng.randint(2, 6), rng.randint(2, 6)
        cells = list("SG" + "H" * (rows * columns // 4)) + ["F"] * 99
        cells = "".join(rng.sample(cells[: rows * columns], rows * columns))
        example = {"layout": [cells[r * columns : (r + 1) * columns] for r in range(rows)]}
        far, at = least(example["layout"]), start_of(example["layout"])
        if at not in far:
            continue
        way, stray = [*task.solution(example, rng)], rng.choices([*STEPS], k=rng.randint(1, 7))
        back = {"up": "down", "down": "up", "left": "right", "right": "left"}[way[0]]
        way = tuple(rng.choice([way, way + stray[:2], way[:-1] + stray[:2], stray,
                                [way[0], back, *way]]))
        left = [far[at]]
        for move in way:
            at = at[0] + STEPS[move][0], at[1] + STEPS[move][1]
            if at not in far:  # a hole, or off the map
                break
            left.append(far[at])
        gains = [a - b for a, b in itertools.pairwise([*left, 99])]
        good = next(n for n, gain in enumerate(gains) if gain != 1)
        progress = 0 if good == left[0] < len(way) else good / left[0]
        assert task.progress(example, way) == pytest.approx(progress), (example, way)
        assert task.exact(example, way) == (good == left[0] == len(way)), (example, way)
        wrong = task.mistake(example, rng)
        assert wrong and not task.exact(example, wrong)
        seen["exact" if task.exact(example, way) else task.thought(example, way)] += 1
    assert len(seen) == 6 and min(seen.values()) > 20

TURNS = [(answer(" 3,14\n"), ("answer", None, (3, 14))), (final(" \n"), ("final", None, None)),
    (answer("( 3, 14 )"), ("answer", None, (3, 14))), (revise("0 24"), ("answer", "far", (0, 24))),
    ("<THINK></THINK>" + answer("1 2"), ("answer", "", (1, 2))),
    ("<THINK>a\nb < c</THINK>" + final("1 2"), ("final", "a\nb < c", None))]
BAD = ["", "3 4", "<ANSWER>3 4", "3 4</ANSWER>", "<ANSWER>3 4</FINAL>", answer("3 4") + final(""),
       "<THINK>x</THINK>", answer("3 4") + " done", "so " + answer("3 4"), answer(answer("3 4")),
       "<THINK>x</THINK>" * 2 + answer("3 4"), "<THINK>x" + answer("3 4"), answer("3 4") * 2,
       "<THINK><ANSWER>3 4</ANSWER></THINK>" + answer("3 4"), "<answer>3 4</answer>", answer("3"),
       answer("3 4 5"), answer("-3 4"), answer("3.5 4"), answer("٣ 4"), answer("25 3"),
       answer("3 25"), answer("9" * 400 + " 1"), answer("1 2 up"), answer(""), final("2 1")]
@pytest.mark.parametrize("text, expected", [*TURNS, *((text, "bad") for text in BAD)])
def test_a_turn_is_parsed_as_the_protocol_says(text, expected):
    assert vrrl.parse_turn(bare("grounding"), final(""))[0] == "bad"  # there is no answer yet
    found = vrrl.parse_turn(bare("grounding"), text, (1, 2))
    assert found == expected if expected != "bad" else (found[0], found[2]) == ("bad", None)

def test_with_moves_a_revised_answer_starts_at_the_last_one_and_coordinates_are_no_answer():
    task, good = bare("grounding", "points.moves=yes"), {
        "left 3 up 1": (3, 14), "down 9": (6, 24), "right 18": (24, 15)}
    for move in [*good, "left 7", "up", "down 10", "9 6", "3 left", "left 3 up", "left -3"]:
        found = "answer" if move in good else "bad", None, good.get(move)
        assert vrrl.parse_turn(task, answer(move), (6, 15)) == found
        assert (task.parse(move) is None) == (move != "9 6")  # a first answer

@pytest.mark.parametrize("name", ["grounding", "navigation"])
def test_no_text_breaks_the_parser_nor_has_nested_tags_accepted(name):
    rng, task, kinds = random.Random(0), bare(name), Counter()
    words = ["3 4", "12 12", "up", "left, down", "٣", "½", "\u2028", "\ue000", "\0", "😀", "/>",
             "9" * 50, "-1", "1e3", "\n", " ", "<THINK", "</", "<", "<FINAL/>"]
    for number in range(3000):
        parts = rng.choices([*vrrl.TAGS, *words], k=rng.randint(0, 12))
        if number % 3:  # near the protocol
            tags = rng.choice((["THINK", "ANSWER"], ["ANSWER"], ["FINAL"], ["THINK", "FINAL"]))
            parts = [part for tag in tags for part in (f"<{tag}>", rng.choice(words), f"</{tag}>")]
        if number % 3 == 2:
            parts.insert(rng.randrange(len(parts)), rng.choice([*vrrl.TAGS, *words]))
        kind, thought, found = vrrl.parse_turn(task, "".join(parts), task.parse("3 4") or ("up",))
        kinds[kind] += 1
        assert (kind == "bad") <= (found is None) <= (kind != "answer")
        names = ["THINK"] * (thought is not None) + [kind.upper()]
        tags = re.findall("|".join(vrrl.TAGS), "".join(parts))
        assert kind == "bad" or tags == [t for n in names for t in (f"<{n}>", f"</{n}>")]
    assert min(kinds["answer"], kinds["final"], kinds["bad"]) > 50

@pytest.mark.parametrize("text", [
    "<THINK>" * 5000, "<ANSWER>" + "up " * 50_000, "<THINK>" * 2000 + "</THINK>" * 2000,
    "<" * 50_000, "<THINK>x</THINK>" + " " * 4000 + "x", answer("up," * 50_000 + "x"),
    answer(" " * 700 + "1" + " " * 700 + "x"), answer("up") + " " * 4000 + "x"], ids=range(8))
def test_pathological_turns_are_parsed_quickly(text):
    began = time.process_time()
    assert [vrrl.parse_turn(bare(name), text)[0] for name in ("grounding", "navigation")]
    assert time.process_time() - began < 0.5

def test_a_crop_shows_its_point_in_the_centre_and_grey_beyond_the_edge():
    pixels = np.random.default_rng(0).integers(0, 100, (60, 90, 3), dtype=np.uint8)
    page = np.pad(pixels, ((24, 24), (24, 24), (0, 0)), constant_values=128)
    for x, y in ((45, 30), (0, 0), (89, 59), (90, 60), (3, 58)):
        drawn = np.asarray(data_prep.draw_crop(Image.fromarray(pixels), (x, y), 48))
        plain = page[y : y + 48, x : x + 48]
        ys, xs = np.nonzero((plain != drawn).any(-1))  # a ring around the middle, which is free
        assert len(xs) > 8 and (xs.min() + xs.max(), ys.min() + ys.max()) == (48, 48)
        assert (24, 24) not in zip(ys, xs)

# ==================== Data and evaluation =========================================================
def parts_of(task):
    return ["train", *(f"{part}_{name}" for part in ("test", "dev") for name in task.splits)]

@pytest.mark.parametrize("kind", ["embedded", "text"])
def test_figures_hold_their_target_in_no_two_places_and_are_made_again_the_same(kind, tmp_path):
    words, seen = (f"points.kind={kind}", "make.train=9", "make.test=2"), set()
    task = made("grounding", *words)
    again = vrrl.Grounding(settings(*words, f"data={tmp_path}"))
    assert contents(task.folder) == contents(again.folder)
    for example in itertools.chain(*map(task.examples, parts_of(task))):
        image, (x0, y0, x1, y1) = task.image(example), example["box"]
        assert list(image.size) == example["size"] and image.tobytes() not in seen
        assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
        seen.add(image.tobytes())
        if kind == "embedded":  # red is in the box alone, and fills at least half of it
            red = (np.asarray(image) == data_prep.RED).all(-1)
            assert red[y0:y1, x0:x1].sum() == red.sum() > 0.5 * (x1 - x0) * (y1 - y0)
            assert task.exact(example, task.solution(example))
            far = np.linalg.norm(np.asarray(image, float) - data_prep.RED, axis=-1)
            alike = ((far >= 70) & (far <= 110)).any()  # out of distribution alone
            assert alike == (not example["id"].startswith(("train", "test_id", "dev_id")))

def test_maps_are_solvable_in_no_two_places_and_other_ways_are_drawn_otherwise(tmp_path):
    task, seen = made("navigation"), {}
    examples = [*itertools.chain(*map(task.examples, parts_of(task)))]
    assert all(start_of(e["layout"]) in least(e["layout"]) for e in examples)
    assert len({(*e["layout"],) for e in examples}) == len(examples) == 60 + 6 * 3
    paint = lambda rng: ({}, Image.new("L", (8, 8), rng.randrange(12)))  # there are just twelve
    data_prep.make_folder(tmp_path / "x", "x", {"train": [()] * 9, "test_id": [()] * 3}, paint)
    assert len({p.read_bytes() for p in (tmp_path / "x" / "images").iterdir()}) == 12
    example = next(e for e in task.examples("train") if len(e["layout"]) == 5)
    for moves in itertools.chain(*(itertools.product(STEPS, repeat=n) for n in (1, 2, 3))):
        cells = np.cumsum([start_of(example["layout"]), *(STEPS[move] for move in moves)], 0)
        if np.isin(cells, range(5)).all():  # it stays on the map
            seen.setdefault(task.feedback(example, moves).tobytes(), []).append(moves)
    assert max(map(len, seen.values())) == 1 and len(seen) > 15

def test_the_shipped_model_has_all_words_of_its_tasks():
    policy = vrrl.load_policy("assets/embedded", settings())
    for name in {*vrrl.TASKS} - {"points"}:
        task, texts = made(name), {"far here edge hole past short longer"}
        texts |= {word for e in task.examples("test_id") for word in task.question(e)}
        texts |= {text for _, turns in task.demonstrations() for text, _ in turns}
        assert not any(policy.tokenizer.unk_token_id in policy.encode(text) for text in texts)

def test_figures_of_an_evaluation_by_hand():
    task, keys = made("grounding"), ["first", "final", "commit", "turns"]
    good = task.say(task.solution(task.examples("train")[0]))
    played = [scripted(policy_of(), text.replace("R", good)) for text in (
        "A R; F", "A 0 24; T R; F", "A 0 24; F", "A R; T 0 24; F", "A 24 0; T 0 24; F")]
    played[2].turns.pop()  # it does not commit
    played[4] = dataclasses.replace(played[4], given=played[4].turns[:1], turns=played[4].turns[1:])
    played = [vrrl.outcome(task, e) for e in played]
    found, health = vrrl.rates(played[:4], 2), vrrl.health(played)
    assert [found[k] for k in (*keys, "repair_own", "break")] == [0.5, 0.5, 0.75, 2.25, 0.5, 0.5]
    assert (found["after_turn"], found["first_by_question"]) == ([0.5, 0.5], "1001")
    keys += ["rollins", "rollin_repair", "commit_wrong"]  # one commit after three wrong answers
    assert [health[k] for k in keys] == [0.5, 0.5, 0.75, 2.25, 0.2, 0, 1 / 3]
    row = found | {"split": "far", "ood": True, "repair_fixed": None}
    lines = data_prep.table({"m": [row, row | {"final": 0.2}]}, vrrl.COLUMNS)
    assert "| m | far | 4 | 50.0 | 50.0 | 50.0 | - | 50.0 | 75.0 | 2.25 |" in lines
    assert "ood** | 8 | 50.0 | 35.0 |" in lines

def test_all_models_repair_the_same_first_turns_and_probes_show_what_they_say(monkeypatch):
    policy, task, cfg = policy_of("taught"), made("grounding"), settings("eval.probes=yes")
    _, fixed, _ = vrrl.evaluate(policy, task, cfg)
    rows, same, _ = vrrl.evaluate(policy_of(), task, cfg, fixed)  # another model
    assert same == fixed and sum(map(len, fixed.values())) > 3
    views = "fixed", "other_picture", "blank", "hidden"
    for row, name, of in itertools.product(rows, views, ("repair", "once")):
        ids = [e["id"] for e in task.examples(f"test_{row['split']}")]
        asked = [i for i, bit in zip(ids, row[f"{of}_{name}_by_question"]) if bit != "-"]
        assert asked == [i for i in ids if i in fixed[row["split"]]]
    one, two, three = task.examples("train")[:3]
    found = vrrl.probes(task, [*zip((one, two, three), said("A 0 0; A 1 24; A 24 1"))])
    shown = {n: view["feedback"](one, (0, 0)) for n, view in found.items() if n != "hidden"}
    assert shown["other_picture"] == task.feedback(two, (1, 24))
    assert shown["blank"].getcolors() == [(48 * 48, (128, 128, 128))]
    alone = vrrl.probes(task, [(one, said("A 0 0")[0])])  # there is no other question
    assert alone["other_picture"]["feedback"](one, (0, 0)) == task.feedback(one, (0, 0))
    starts, play = [], vrrl.play
    monkeypatch.setattr(vrrl, "play", lambda p, t, s, *a: starts.extend(s) or play(p, t, s, *a))
    vrrl.play_greedy(policy, task, [(one, said("A 0 0")[0])], 3, **found["hidden"])
    (start,) = starts
    assert start.question_picture.image.getcolors() == [(96 * 96, (128, 128, 128))]
    assert start.given[0].picture.image == task.feedback(one, (0, 0))

# ==================== Runs ========================================================================
def words_of(folder, *more):
    """A short run of the taught model in `folder`."""
    return [*BASE, f"model={taught()}", "policy.temperature=1", "sft.first_steps=0", "sft.steps=1",
            "rl.steps=6", f"run={folder}", *more]

def start(words, *module):
    """The command in a process of its own, with one thread."""
    return subprocess.Popen(
        [sys.executable, *module, vrrl.HERE / "vrrl.py", *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

def ended(run, code=0):
    """(what it printed, its last line of errors), once it has ended with this exit code."""
    text, error = run.communicate(timeout=150)
    assert run.returncode == code, error
    return text, "".join(error.splitlines()[-1:])

@functools.cache
def whole():
    """The folder of a run that was not disturbed."""
    return vrrl.main(words_of(HOME / "whole" / "run")) or HOME / "whole" / "run"

def test_a_run_leaves_its_table_pictures_figures_and_the_model_that_has_them():
    folder, expected = whole(), [*itertools.product(("sft", "vrrl"), made("grounding").splits)]
    assert {p.name for p in folder.iterdir()} == {
        "settings.yaml", "metrics.jsonl", "results.json", "report.md",
        "curves.png", "episodes.png", "model", "lock"}
    lines, report = lines_of(folder), (folder / "report.md").read_text()
    assert all(f"| {model} | {split} | 3 |" in report for model, split in expected)
    assert "once" not in report  # the probes were not asked for
    assert [(row["method"], row["split"]) for row in rows_of(folder)] == expected
    assert [(m["stage"], m["step"]) for m in lines] == [("rl", n) for n in range(1, 7)]
    assert all(m["off_policy"] < 2e-4 for m in lines)
    assert max(m["grad_norm"] for m in lines) > 0 < max(m["rollins"] for m in lines)
    kept, (_, flat) = (folder / "settings.yaml").read_text(), vrrl.read_config(words_of(folder))
    assert flat.items() <= yaml.safe_load(kept).items()
    words = "mode=eval", f"model={folder / 'model'}", "eval.probes=yes"
    vrrl.main(words_of(folder.parent / "eval", *words))
    assert "| once fixed | once other picture |" in (folder.parent / "eval/report.md").read_text()
    same = "split", "final", "commit", "turns", "first_by_question", "final_by_question"
    assert [[row[k] for k in same] for row in rows_of(folder.parent / "eval")] == [
        [row[k] for k in same] for row in rows_of(folder) if row["method"] == "vrrl"]

def test_the_same_command_prints_the_table_and_other_settings_are_refused(capsys, fails):
    before = contents(whole().parent)
    capsys.readouterr()
    vrrl.main(words_of(whole()))
    assert (whole() / "report.md").read_text() in capsys.readouterr().out
    line = fails(vrrl.main, words_of(whole(), "rl.lr=0.01"))
    assert "rl.lr=" in line and "now 0.01" in line and str(whole()) in line
    assert contents(whole().parent) == before  # neither trains

@pytest.mark.skipif(GPU, reason="on a GPU runs are not equal byte for byte")
def test_a_run_that_was_stopped_and_killed_ends_as_one_that_was_not(tmp_path):
    words, folder = words_of(tmp_path / "run"), tmp_path / "run"
    for number, step, code in ((signal.SIGINT, 2, 130), (signal.SIGKILL, 4, -9)):
        run, said = start(words), f'"step": {step},'
        while run.poll() is None and not any(
                said in file.read_text() for file in folder.glob("metrics.jsonl")):
            time.sleep(0.02)
        run.send_signal(number)
        assert "the same command goes on" in ended(run, code)[1] or code < 0
    ended(start(words))
    for name in ("report.md", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole() / name).read_bytes(), name
    assert untimed(lines_of(folder)) == untimed(lines_of(whole()))

def untimed(lines):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]

@pytest.mark.parametrize("name, content", [("run/settings.yaml", "a: ["), (
    "sft-*/settings.yaml", "5"), ("sft-*/evaluation-*.json", "{"), ("sft-*/model/config.json", "")])
def test_a_damaged_file_of_a_run_is_named_in_one_line(fails, tmp_path, name, content):
    shutil.copytree(whole().parent, tmp_path / "x")
    (tmp_path / "x" / "run" / "results.json").rename(tmp_path / "x" / "run" / "rl.checkpoint")
    file, = (tmp_path / "x").glob(name)
    file.write_text(content)
    line = fails(vrrl.main, words_of(tmp_path / "x" / "run"))
    assert f"{file}" in line or f"{file.parent}" in line

def test_a_setting_that_is_younger_than_a_run_counts_as_its_default(tmp_path, fails, capsys):
    shutil.copytree(whole().parent, tmp_path / "x")
    file = tmp_path / "x" / "run" / "settings.yaml"
    file.write_text("".join(line for line in file.open() if not line.startswith("rl.kl")))
    (tmp_path / "x" / "run" / "metrics.jsonl").write_bytes(b"\xff\n[]\n{\n")  # not looked at
    vrrl.main(words_of(tmp_path / "x" / "run"))
    assert "| vrrl | id |" in capsys.readouterr().out
    assert "rl.kl=" in fails(vrrl.main, words_of(tmp_path / "x" / "run", "rl.kl=0.5"))

def test_a_model_that_has_had_its_sft_goes_straight_to_rl(tmp_path):
    own = f"model={next(whole().parent.glob('sft-*')) / 'model'}"
    words = "sft.steps=0", "sft.first_steps=0", "method=sft", "rl.questions=16", "rl.steps=1"
    vrrl.Run(tmp_path / "run", {"seed": 5}).lock.close()  # it has trained nothing: no refusal
    vrrl.main(words_of(tmp_path / "run", own, *words))
    assert {row["method"] for row in rows_of(tmp_path / "run")} == {"sft", "sft + RL"}

def test_two_workers_train_as_one(tmp_path):
    words = "rl.steps=3", "sft.steps=2", "rl.rho=0", "device=cpu"  # one GPU takes one worker
    two = start(words_of(tmp_path / "two" / "run", *words), "-m", "torch.distributed.run",
                "--nproc-per-node=2", "--master-addr=127.0.0.1")
    vrrl.main(words_of(tmp_path / "one" / "run", *words))
    ended(two)
    for folder in ("sft-*", "run"):
        logs = [lines_of(next((tmp_path / name).glob(folder))) for name in ("one", "two")]
        for one, other in zip(*logs, strict=True):
            one, other = untimed([one, other])
            assert one == pytest.approx(other, abs=1e-4)

@pytest.mark.parametrize("task, method", [
    *(("grounding", method) for method in CONFIG["methods"]), ("navigation", "vrrl")])
def test_every_method_runs_and_changes_weights(task, method, monkeypatch):
    folder, steps = HOME / task / method, CONFIG["methods"][method].get("rl.steps", 1)
    if task == "navigation":  # of which the model has not learnt to speak
        monkeypatch.setattr(vrrl, "reward", lambda task, e, **n: sum(e.rest[0]) % 7 / 10)
    words = f"task={task}", f"method={method}", f"rl.steps={steps}", "rl.questions=16"
    vrrl.main(words_of(folder, *words))
    assert {row["method"] for row in rows_of(folder)} == {"sft", method}
    if steps:
        own, *before = ([*vrrl.load_policy(f / "model", settings()).model.parameters()]
                        for f in (folder, *folder.parent.glob("sft-*")))
        assert all(furthest(own, others) > 1e-7 for others in before)

def six_steps(folder, dtype="float32", upto=6):
    """(numbers, weights, states) of steps as a stage takes them, with a checkpoint after each."""
    torch.manual_seed(0)
    module, buffer, seen = torch.nn.Linear(3, 2, bias=False), buffer_of(), []
    module.to(getattr(torch, dtype))
    optimizer, run = vrrl.AdamW(SimpleNamespace(model=module)), vrrl.Run(folder, {"a": 1})
    for step in run.steps("rl", 6, optimizer, buffer):
        (module.weight * torch.arange(6.0).sub(step).view(2, 3)).sum().backward()
        optimizer.step(0.01)
        buffer.add((f"q{step}", [[step]], step % 2 == 0))
        run.log(twice=2 * step)
        run.save(optimizer, buffer)
        seen.append(step)
        if step == upto:
            break
    return seen, module.weight.tolist(), [[s[0] for s in q] for q in (buffer.wrong, buffer.correct)]

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_goes_on_from_its_last_checkpoint(tmp_path, dtype):
    _, *expected = six_steps(tmp_path / "a", dtype)
    six_steps(tmp_path / "b", dtype, upto=3)
    seen, *found = six_steps(tmp_path / "b", dtype)
    assert seen == [4, 5, 6] and found == expected
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")

@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: b"x" + b[1:]])
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, fails, damage):
    six_steps(tmp_path, upto=3)
    file = tmp_path / "rl.checkpoint"
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file} is damaged" in fails(lambda words: six_steps(tmp_path))
    file.unlink()
    assert six_steps(tmp_path)[0] == [1, 2, 3, 4, 5, 6]

@pytest.mark.parametrize("what", ["checkpoint", "file", "model"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(what, tmp_path, fails):
    six_steps(tmp_path, upto=1)
    policy_of().save(tmp_path / "model")
    optimizer, run = vrrl.AdamW(policy_of()), vrrl.Run(tmp_path, {"a": 1})
    run.stage, run.step, before = "rl", 2, contents(tmp_path)
    run.checkpoint = tmp_path / "rl.checkpoint"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # of a file: as a full disk
    try:
        write = {
            "checkpoint": lambda words: run.save(optimizer, None),
            "file": lambda words: data_prep.write_file(tmp_path / "x", "x" * 400_000),
            "model": lambda words: policy_of().save(tmp_path / "model")}
        assert ("large" if what == "file" else "cannot be written") in fails(write[what])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before

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

def test_a_chart_of_a_figure_that_the_log_lacks_is_an_error(tmp_path):
    line, charts = {"stage": "rl", "step": 1, "loss": None, "kl": 0.0}, {"rl": {"a": "loss kl"}}
    (tmp_path / "m").write_text(json.dumps(line))
    data_prep.curves(tmp_path / "x.png", [tmp_path / "m"], charts)
    for renamed in ({"rl": {"a": "loss kl_"}}, {"sft": {"a": "loss"}}):
        with pytest.raises(KeyError):
            data_prep.curves(tmp_path / "x.png", [tmp_path / "m"], renamed)

# ==================== Bad input ===================================================================
@pytest.mark.parametrize("word, said", [
    ("rl.step=3", "nearest: rl.steps"), ("lr=1", "nearest: "), ("--seed", "key=value"),
    ("seed=three", "0 to 1000000"), ("rl.steps=1.5", "a whole number"), ("rl.rho=1.01", "0 to 1"),
    ("rl.lr=nan", "0 to 1"), ("rl.std_norm=maybe", "yes, no"), ("method=ppo", "sft"),
    ("model=nowhere", "model=nowhere"), ("model=assets/x", "config.json"), ("model=/tmp", "/tmp"),
    ("model=", "model="), ("none.yaml", "none.yaml: cannot be read"), ("rl: {steps: [", "as YAML"),
    ("- 1\n- 2", "not a table"), ("rl: {stepz: 3}", "nearest: rl.steps"), ("seed: \xff", "seed="),
    ("points.question=find", "text {question}"), ("data=config.yaml", "needs task=points")])
def test_a_wrong_word_or_file_of_settings_is_one_clear_line(fails, tmp_path, word, said):
    if ": " in word or word[:2] == "- ":
        (tmp_path / "my.yaml").write_text(word)
        word = f"{tmp_path / 'my.yaml'}"
    assert said in fails(vrrl.main, [word])

def changed(name, **keys):
    def change(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | keys))
    return change

def reweighed(change):
    """A change of a model's weights, {name: tensor}."""
    def change_file(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return change_file

def thinking(folder):
    template = (folder / "chat_template.jinja").read_text()
    ends = template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    (folder / "chat_template.jinja").write_text(ends)

def more_words(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{n}" for n in range(99)])
    tokenizer.save_pretrained(folder)

@pytest.mark.parametrize("change, said", [
    *((lambda folder, name=name: (folder / name).unlink(), "") for name in (
        "model.safetensors", "tokenizer.json", "preprocessor_config.json", "config.json")),
    (reweighed(lambda found: found.pop("model.language_model.norm.weight")), "lack 1 tensors"),
    (reweighed(lambda found: [*found.values()][0].view(-1)[:1].fill_(math.nan)), "is not finite"),
    (changed("config.json", model_type="qwen2_vl"), "it is a qwen2_vl"),
    (changed("preprocessor_config.json", patch_size=14), "(14, 2, 2) in its image processor"),
    (changed("preprocessor_config.json", merge_size=1), "(8, 1, 2) in its image processor"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapters alone"),
    (thinking, "opens a turn otherwise"), (more_words, "words, its embedding"),
    ])
def test_models_with_lost_or_unfit_parts_are_refused_in_one_line(fails, tmp_path, change, said):
    shutil.copytree(folder_of("embedded"), tmp_path / "model")
    change(tmp_path / "model")
    word = f"model={tmp_path / 'model'}"
    line = fails(vrrl.main, words_of(tmp_path / "run", word, "mode=eval"))
    assert word in line and said in line

@pytest.mark.parametrize("text", ["find <|im_end|>", "<|image_pad|>", "find \ue000"])
def test_texts_with_tokens_of_the_models_own_are_refused_where_they_stand(fails, tmp_path, text):
    line = fails(lambda words: own(tmp_path, {"question": text}))
    assert "my.jsonl:2" in line and "means something else" in line
    for key in ("points.reply", "policy.system"):
        line = fails(vrrl.main, words_of(tmp_path / key, f"{key}={text}", "mode=eval"))
        assert f"{text!r} holds" in line

def test_what_cannot_be_written_said_or_kept_is_one_clear_line(fails, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder, word, line in (("file/run", "seed=0", str(tmp_path)), ("a", "seed=0", "in use"),
                               ("b", f"data={tmp_path / 'file' / 'data'}", str(tmp_path)),
                               ("c", "points.reply=lookout", "lookout")):  # no word of the model's
        with data_prep.lock(tmp_path / "a"):
            assert line in fails(vrrl.main, words_of(tmp_path / folder, word))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
            "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")):
        assert "policy.rows" in fails(lambda words: (_ for _ in ()).throw(error))

GOOD = {"image": "picture1.png", "question": "find the red", "box": [1, 2, 13, 14]}
def own(folder, *lines, count=24, size=(40, 30), box=(4, 5, 21, 25.5)):
    """One's own data: a JSONL file of pictures, the given lines in second place."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        for kind in ("png", "bmp"):  # one picture in two files
            Image.new("RGB", size, (n, 0, 0)).save(folder / f"picture{n}.{kind}")
    good = [json.dumps({**GOOD, "image": f"picture{n}.png", "box": box}) for n in range(count)]
    lines = [line if isinstance(line, str) else json.dumps({**GOOD, **line}) for line in lines]
    (folder / "my.jsonl").write_text("\n".join([good[0], *lines, *good[1:]]), "utf-8-sig")
    return vrrl.OwnPoints(settings("task=points", f"data={folder / 'my.jsonl'}"))

@pytest.mark.parametrize("line, reason", [
    ("{not json", "JSON"), ("[]", "JSON object"), ({"image": "none.png"}, "none.png"),
    ({"image": "/etc/passwd"}, "leads out"), ({"image": "../x.png"}, "leads out"),
    ({"image": "my.jsonl"}, "not a usable image"), ({"image": 3}, '"image"'), ({"id": 5}, '"id"'),
    ({"id": "line-1"}, "twice"), ({"question": " "}, '"question"'), ({"box": None}, '"box"'),
    ({"box": [1, 2, 3, True]}, '"box"'), ({"layout": [], "question": None}, '"question"'),
    ({"box": [5, 2, 5, 9]}, "empty"), ({"box": [0, 0, 1, 0.5]}, "normalised"),
    ({"box": [-1, 2, 8, 9]}, "leaves its image of 40 x 30"), ({"box": [1, 2, 8, 31]}, "40 x 30")])
def test_a_bad_line_of_ones_own_data_is_named_by_file_and_line(fails, tmp_path, line, reason):
    said = fails(lambda words: own(tmp_path, line))
    assert f"{tmp_path / 'my.jsonl'}:2:" in said and reason in said

def test_ones_own_data_is_divided_by_image_and_goes_through_a_run(tmp_path):
    twins = [{"image": f"picture{n}.bmp", "box": [0, 0, 9, 9]} for n in range(24)]
    task, run = own(tmp_path, *twins), tmp_path / "run"
    parts = [{e["image"] for e in task.examples(part)} for part in ("train", "dev_id", "test_id")]
    assert len(set.union(*parts)) == 48 == sum(map(len, parts)) and len(parts[0]) > 24
    assert all({n[:-3] + kind for n in part for kind in ("bmp", "png")} == part for part in parts)
    vrrl.main(words_of(run, "task=points", f"data={tmp_path / 'my.jsonl'}", "rl.steps=0",
                       "points.question={question} the"))
    assert (run / "episodes.png").is_file()

@pytest.mark.parametrize("data, changed", [
    ("my.jsonl", "my.jsonl"), ("my.jsonl", "picture3.png"), ("", "picture3.png")])
def test_a_run_knows_its_data_by_what_is_in_the_files(tmp_path, data, changed):
    own(tmp_path)
    (tmp_path / "data.json").write_text("{}")  # as a folder of imported maps has it
    cfg = settings("task=points", f"data={tmp_path / data}")
    before, file = vrrl.fingerprint(cfg), tmp_path / changed
    file.write_bytes(file.read_bytes() + b"\n")
    after = vrrl.fingerprint(cfg)
    assert {key for key in before if before[key] != after[key]} == {"data_files"}

def test_ones_own_data_that_cannot_be_used_is_one_clear_line(fails, tmp_path):
    assert "my.jsonl" in fails(lambda words: own(tmp_path, count=2))
    tiny = lambda words: own(tmp_path, box=(2.1, 2.1, 2.2, 2.2)).demonstrations()
    assert "points.scale" in fails(tiny)
    words = words_of(tmp_path / "run", "task=points", f"data={tmp_path / 'none.jsonl'}")
    assert "none.jsonl" in fails(vrrl.main, words)
    long = lambda words: own(tmp_path / "long", size=(900, 3), box=(4, 0, 9, 2))
    assert "900 x 3" in fails(long)
    own(tmp_path / "edge", size=(400, 2), box=(4, 0, 9, 2))  # 200:1 is taken

ODD = r'''null true -1 1e999 NaN 0.5 [] {} , "" "x" "4" "id" "layout" "line-1" "\ud800" "\u0000" "."
    "none.png" "zero.png" "cut.png" "out.png" "../x.png" "/etc/passwd" "my.jsonl" "picture2.png"
    '''.split() + ['" "', "9" * 5000, "[" * 100_000, "\0", "\r", ""]
ENDS, CODES = ["\n"] * 9 + ["\r\n", "\n \n", "\r"], ["utf-8"] * 9 + ["utf-8-sig", "utf-16", "cp500"]
@pytest.mark.parametrize("name, count", [("points", 1000), ("grounding", 300), ("navigation", 300)])
def test_a_fuzzed_file_of_examples_is_read_rightly_or_named_with_its_line(tmp_path, name, count):
    task, rng, refused, file = own(tmp_path, count=12), random.Random(0), 0, tmp_path / "my.jsonl"
    read = lambda: sum(vrrl.OwnPoints(task.cfg).own.values(), [])
    if name != "points":
        task = vrrl.TASKS[name](settings(f"task={name}", f"data={tmp_path}", "make.train=12"))
        file, read = task.folder / "train.jsonl", lambda: task.examples("train")
    (task.folder / "cut.png").write_bytes((tmp_path / "picture1.png").read_bytes()[:-20])
    (task.folder / "zero.png").touch()
    (task.folder / "out.png").symlink_to("/etc/passwd")
    pick = lambda rows: sorted(json.dumps([e["image"], e.get("question"), e.get("box")],
                                          ensure_ascii=False).encode() for e in rows)
    for _, whole in itertools.product(range(count), [file.read_text("utf-8-sig")]):
        lines, at = whole.splitlines(), rng.randrange(12)
        odd = lambda part: rng.choice(ODD) if rng.random() < 0.02 else part[0]
        lines[at] = re.sub(r'"[^"]*"|[-.\d]+|.', odd, lines[at])
        raw = bytearray(rng.choice(ENDS).join(lines), rng.choice(CODES))
        raw[rng.randrange(len(raw))] ^= rng.choice([0] * 9 + [1, 32, 255])
        file.write_bytes(raw)
        try:
            found = read()
        except vrrl.UserError as error:
            assert re.fullmatch(rf"{file}(:\d+: .+|: too few .+)", str(error))
            refused += 1
            continue
        rows = (json.loads(x.decode("utf-8-sig")) for x in raw.split(b"\n") if x.strip())
        assert pick(found) == pick(rows)
        for e in [*found, *found[at : at + 1]]:
            (x0, y0, x1, y1), (width, height) = e.get("box", (0, 0, 2, 2)), e["size"]
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and task.question(e)
        with contextlib.suppress(vrrl.UserError):  # a picture that changed, a tiny box
            task.feedback(e, task.mistake(e, rng)), task.exact(e, task.mistake(e, rng))
    assert 0.1 < refused / count < 0.9

def test_an_image_that_is_huge_or_unclear_is_refused_by_name(tmp_path):
    for name, mode, form in ("key", "I;16", "PNG"), ("deep", "I", "TIFF"), ("float", "F", "TIFF"):
        Image.new(mode, (2, 2)).save(tmp_path / f"{name}.png", form, transparency=0)
    Image.new("I;16", (2, 2)).save(tmp_path / "negative.png", "TIFF")
    tiff, tag = (tmp_path / "negative.png").read_bytes(), b"\6\1\3\0\1\0\0\0"  # which end is white
    (tmp_path / "negative.png").write_bytes(tiff.replace(tag + b"\1", tag + b"\0"))
    Image.new("1", (4097, 30)).save(tmp_path / "huge.png")
    for name in ("key", "deep", "float", "negative", "huge", "none"):
        with pytest.raises(vrrl.UserError, match=f"{name}.png: not a usable image"):
            data_prep.load_image(tmp_path / f"{name}.png")

def test_pictures_of_every_format_mode_and_orientation_are_shown_as_on_white(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (2, 3, 4))
    source = Image.fromarray(np.uint8(np.kron(blocks, np.ones((16, 16, 1)))))
    grey = np.uint8(source.convert("L"))[..., None]
    deep = Image.fromarray(grey[..., 0] * np.uint16(257))
    turned = lambda a, n: (a.swapaxes(0, 1) if n > 4 else a)[  # what the EXIF orientation n asks
        :: -1 if n % 4 in (0, 3) else 1, :: -1 if n % 4 in (2, 3) else 1]
    Image.init()
    forms = sorted({*Image.SAVE} - {*"EPS ICNS ICO IM PALM PDF SPIDER".split()})  # read otherwise
    modes = "1 L LA P PA RGB RGBA RGBX CMYK YCbCr HSV I;16".split()
    for form, mode, n in itertools.product(forms, modes, range(1, 9)):
        exif, file = Image.Exif(), tmp_path / f"{form}-{mode}-{n}"
        exif[0x112] = n = n if form in "PNG JPEG WEBP TIFF MPO AVIF".split() else 1
        plain = source if mode[-1] in "AP" else source.convert("RGB")
        try:
            (deep if mode == "I;16" else plain.convert(mode)).save(file, form, exif=exif)
        except (OSError, ValueError, KeyError):  # this format has no such mode
            continue
        if n == 1:
            with Image.open(file) as plain:
                rgba = np.float64(plain.convert("RGBA"))
                right = 255 - rgba[..., 3:] / 255 * (255 - rgba[..., :3])
                right = grey if plain.mode[0] == "I" else right
        found = np.float64(data_prep.load_image(file))
        assert abs(found - turned(right, n)).max() <= 1, file
    assert len([*tmp_path.iterdir()]) > 300

def test_the_authors_maps_and_pictures_become_a_data_folder(tmp_path, capsys):
    def official(*entries):
        (tmp_path / "x.json").write_text(json.dumps(entries), encoding="utf-8-sig")
        data_prep.main(["official", f"data={tmp_path / 'data'}", f"eval={tmp_path / 'x.json'}"])
        return max((tmp_path / "data").glob("official-*"), key=os.path.getmtime)
    entry = lambda picture, *layout, start=0: {"input_map": picture, "id": picture, "metadata": {
        "layout": layout, "start_pos": start, "target_pos": len("".join(layout)) - 1}}
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    for said, *wrong in (("", 5), ("", {"id": "a"}), ("twice", *[entry("a", "SF", "HG")] * 2),
                         ("no way", entry("a", "SH", "HG")), ("out", entry("../a.png", "SF", "HG")),
                         ("through a link", entry("link.png", "SF", "HG")), ("no map",),
                         ("start_pos", entry("a", "SF", "HG", start=1))):
        with pytest.raises(SystemExit):
            official(*wrong)
        assert re.fullmatch(rf"error: .*x\.json.*{said}.*\n", capsys.readouterr().err)
    image = Image.new("RGB", (48, 44), "white")  # with a margin, as theirs
    for colour in ((0, 0, 0), (9, 9, 9)):
        image.paste(colour, (4, 2, 44, 42))
        image.save(tmp_path / "a.png")
        folder = official(entry("a.png", "SF", "HG"), entry("", "SF", *["FF"] * 4, "FG"))
    assert len([*folder.parent.glob("official-*")]) == 2  # one for each of the two pictures
    task = vrrl.Navigation(settings("task=navigation", f"data={folder}"))
    (one,), (two,) = map(task.examples, ("test_id", "test_size"))
    assert one["layout"] == ["SF", "HG"] and one["box"] == [4, 2, 44, 42] and two["drawn"] == "here"
    changed = (np.asarray(task.feedback(one, ("right", "down"))) != np.asarray(image)).any(-1)
    assert changed[2:42, 4:44].sum() == changed.sum() > 100 and changed[12, 24] and changed[22, 34]

def test_help_exits_0_and_names_every_setting_and_a_mistake_exits_2(capsys):
    run, wrong = start(["--help"]), start(["rl.stepz=3"])
    text, error = ended(run)
    assert data_prep.main(["--help"]) is None and capsys.readouterr().out.startswith("usage: ")
    words = [sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import data_prep"]
    line = subprocess.run(words, cwd=vrrl.HERE, capture_output=True, text=True).stderr
    assert re.fullmatch("error: .*Linux and macOS.*\n", line)  # on Windows
    assert not error and text.startswith("usage: ")
    assert all(f" {key.split('.')[-1]}: " in text and row[2] in text for key, row in TABLE.items())
    assert ended(wrong, 2) == ("", "error: unknown setting 'rl.stepz'; nearest: rl.steps")

# ==================== The repository ==============================================================
def test_every_setting_has_a_range_and_a_sentence_and_words_win_over_rows(tmp_path):
    (tmp_path / "my.yaml").write_text("method: rl\nrl: {steps: 5, std_norm: yes}\n")
    cfg, flat = vrrl.read_config(["rl.steps=4", f"{tmp_path / 'my.yaml'}", "rl.rho=0.5"])
    assert (cfg.rl.steps, cfg.rl.std_norm, cfg.rl.rho, cfg.rl.mask) == (5, True, 0.5, "none")
    assert flat.keys() == TABLE.keys()
    rows = {kind: [*CONFIG[f"{kind}s"]] for kind in ("task", "method", "profile")}
    for key, (default, allowed, sentence) in TABLE.items():
        allowed = "|".join(rows[key]) if allowed == "rows" else allowed
        assert vrrl.check_value(key, default, {key: (default, allowed, sentence)}) == default
        assert allowed[:4] == "text" or ".." in allowed or "|" in allowed
    assert {*rows["task"]} == {*vrrl.TASKS}
    for words in itertools.product(*([f"{kind}={row}" for row in rows[kind]] for kind in rows)):
        vrrl.read_config(words)

"""How the weights in assets/embedded were made: `python assets/make_embedded.py [FOLDER] [seed=0]`.

The default model is small enough for a CPU, but it is a real Qwen3-VL, made from a config. It comes
with eyes: as a downloaded VLM has seen pictures of all kinds, this one has learnt to say what is in
pictures of all splits. It is never asked where a target is in a picture, nor for a way:

    say the cells    what is in each cell of a map, and whether a drawn path covers it
    say the path     the moves of a drawn path
    say the point    the coordinates of a point under cross hairs
    say the offset   on a crop: where the red thing lies, "left 3 up 1", "far" or "here"
    move left 3 up 1 the coordinates after that move from the last point that was said

The last two are what corrections need: measuring and adding, which a real VLM brings along. The
weights in assets/embedded are from commit 92a0fbd, where small tables nearly filled the canvas.
"""
import collections
import math
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data_prep
import vrrl

WORDS = """user assistant system up down left right ice hole elf gift path crash start found edge
           short past longer exact find the check it say cells point offset move red page far
           here""".split()
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def build(seed):
    """(model, tokenizer, image processor) with random weights. A visual token is 16 x 16 pixels,
    2 x 2 patches. `initializer_range` decides whether it learns to see: with the usual 0.02 a model
    this small does not."""
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad unknown".split()
    special = [f"<|{name}|>" for name in names]
    words = [*special, *vrrl.TAGS, *WORDS, *map(str, range(25))]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[-1]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=special[0], eos_token="<|im_end|>", unk_token=special[-1],
        additional_special_tokens=special)
    tokenizer.add_tokens(vrrl.TAGS)
    tokenizer.chat_template = CHAT
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5],
                mrope_interleaved=True)
    text = dict(vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_parameters=rope,
                max_position_embeddings=4096, initializer_range=0.06, tie_word_embeddings=True)
    vision = dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8,
                  spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=128,
                  num_position_embeddings=256, deepstack_visual_indexes=[], initializer_range=0.06)
    ids = {f"{name.removesuffix('_pad')}_token_id": vocabulary[f"<|{name}|>"]
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision,
                                        tie_word_embeddings=True, **ids)
    torch.manual_seed(seed)
    processor = vrrl.qwen_images.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 256, "longest_edge": 1 << 20}, patch_size=8, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.Qwen3VLForConditionalGeneration(config), tokenizer, processor

# ---- lessons: conversations as lists of (image, question, answer)

def navigation_talk(rng, pictures):
    """One map; first its cells or a drawn path, then other paths drawn on it."""
    size, look = rng.choice((3, 4, 5, 6, 7)), rng.choice((*data_prep.LOOKS, *data_prep.MIXES))
    holes = round(rng.uniform(0, 0.45) * (size * size - 2))
    cells = ["F"] * (size * size)
    for kind, at in zip("SG" + "H" * holes, rng.sample(range(size * size), holes + 2)):
        cells[at] = kind
    layout = ["".join(cells[row * size : (row + 1) * size]) for row in range(size)]
    plain, start, talk = data_prep.draw_grid(layout, look), data_prep.find_cell(layout, "S"), []
    for number in range(pictures):
        moves, covered = random_walk(rng, size, start)
        kind, image = rng.randrange(4), plain
        if kind or number:
            image = data_prep.draw_path(plain, (size, size), start, moves, look)
        if kind % 2 or number:
            talk.append((image, "say the path", " ".join(moves)))
        else:
            names = {"F": ("ice", "path"), "H": ("hole", "crash"), "S": ("elf", "start"),
                     "G": ("gift", "found")}
            said = [names[layout[row][column]][kind > 0 and (row, column) in covered]
                    for row in range(size) for column in range(size)]
            talk.append((image, "say the cells", " ".join(said)))
    return talk

def random_walk(rng, size, start):
    """(moves, the cells that they cover): 1 to 2 * size moves, which mostly go on or turn.
    Sometimes the last one leaves the map."""
    at, moves, covered = start, [], {start}
    for _ in range(rng.randint(1, 2 * size)):
        options = []
        for move, (down, right) in data_prep.MOVES.items():
            there = at[0] + down, at[1] + right
            inside = 0 <= there[0] < size and 0 <= there[1] < size
            back = moves and data_prep.MOVES[moves[-1]] == (-down, -right)
            weight = (0.1 if back else 4 if moves and move == moves[-1] else 2) if inside else 0.1
            options.append((move, there, inside, weight))
        move, at, inside, _ = rng.choices(options, [option[3] for option in options])[0]
        moves.append(move)
        if not inside:
            break
        covered.add(at)
    return moves, covered

SHAPES = (("bars", (6, 9)), ("scatter", (10, 16)), ("table", (4, 7)), ("table", (9, 11)))

def pointing_talk(rng, pictures, task):
    """One figure: a point on the whole of it, then crops around the point as it moves."""
    shape, size = rng.choice(SHAPES)
    record, image = data_prep.make_figure(rng, shape, size)
    example, scale = {**record, "size": image.size}, task.cfg.points.scale

    def near(point, reach):
        """Another point, at most so far away along each side."""
        return tuple(min(max(c + rng.randint(-reach, reach), 0), scale) for c in point)

    # Mostly where a crop shows the target.
    point = task.wrong(example, rng) if rng.random() < 0.3 else near(task.right(example), 6)
    if pictures == 1 and rng.random() < 0.7:  # crops from the first stage on
        shown = data_prep.draw_crop(image, task.pixel(example, point), task.cfg.points.crop)
        if rng.random() < 0.5:
            return [(shown, "say the cells", red_cells(example, point, task))]
        return [(shown, "say the offset", task.thought(example, point))]
    hairs = data_prep.draw_hairs(image, task.pixel(example, point))
    talk = [(hairs, "say the point", task.say(point))]
    while len(talk) < pictures:
        shown = data_prep.draw_crop(image, task.pixel(example, point), task.cfg.points.crop)
        if rng.random() < 0.5:
            talk.append((shown, "say the offset", task.thought(example, point)))
            continue
        there = near(point, rng.randint(1, 6))
        x, y = there[0] - point[0], there[1] - point[1]
        words = [f"{'left' if x < 0 else 'right'} {abs(x)}"] if x else []
        words += [f"{'up' if y < 0 else 'down'} {abs(y)}"] if y else []
        if words:
            talk.append((shown, f"move {' '.join(words)}", task.say(there)))
            point = there
    return talk

def red_cells(example, point, task):
    """For each 16 x 16 pixels of a crop, row by row, whether they show some of the target."""
    side, (x, y) = task.cfg.points.crop, task.pixel(example, point)
    left, top, (x0, y0, x1, y1) = round(x) - side // 2, round(y) - side // 2, example["box"]
    return " ".join("red" if x0 < c + 16 and x1 > c and y0 < r + 16 and y1 > r else "page"
                    for r in range(top, top + side, 16) for c in range(left, left + side, 16))

def lesson(policy, talk, number):
    """A conversation as an Episode whose answers are all taught."""
    picture = vrrl.Picture(talk[0][0], policy.processor)
    head, _, _ = policy.prompt(talk[0][1], "")
    asked = {"talk": [(question, answer) for _, question, answer in talk]}  # for count_right
    episode = vrrl.Episode(asked, policy.place(head, picture), picture, number)
    for (_, _, answer), after in zip(talk, [*talk[1:], None]):
        ids = [*policy.encode(answer), policy.end_id]
        turn = vrrl.Turn(ids, [True] * len(ids))
        if after:
            turn.picture = vrrl.Picture(after[0], policy.processor)
            turn.feedback = policy.place(policy.prompt("", after[1])[2], turn.picture)
        episode.turns.append(turn)
    return episode

# ---- training

# Title, updates, length of the rate's cosine in updates, most pictures, peak of the rate.
STAGES = (("single pictures", 600, 600, 1, 1.5e-3), ("conversations", 400, 1600, 6, 1.5e-3),
          ("more conversations", 300, 420, 6, 1.3e-3))
BATCH = 256  # conversations an update

def start_maker(words, folder):
    """What a process that makes lessons needs: the tokenizer, in a policy that is never trained."""
    cfg, _ = vrrl.read_config([*words, "device=cpu"])
    torch.set_num_threads(1)
    start_maker.policy = vrrl.load_policy(folder, cfg)
    start_maker.task = vrrl.Points.__new__(vrrl.Points)
    start_maker.task.cfg = cfg

def make_batch(job):
    """The episodes of one update; job: (seed, stage, step, most pictures)."""
    rng, episodes = random.Random(f"{job[:3]}"), []
    for number in range(BATCH):
        pictures = rng.randint(1, job[3])
        talk = (navigation_talk(rng, pictures) if number % 3 == 0 else
                pointing_talk(rng, pictures, start_maker.task))
        episodes.append(lesson(start_maker.policy, talk, number))
    return episodes

def in_advance(makers, jobs, most=40):
    """The results of make_batch in order; at most so many are made before they are wanted."""
    pending = collections.deque()
    for job in jobs:
        pending.append(makers.apply_async(make_batch, (job,)))
        if len(pending) == most:
            yield pending.popleft().get()
    while pending:
        yield pending.popleft().get()

def main(words):
    words = ["policy.temperature=1.0", "policy.freeze_vision=no", "policy.dtype=float32", *words]
    folder = next((Path(word) for word in words if "=" not in word), HERE / "embedded")
    words = [word for word in words if "=" in word]
    cfg, _ = vrrl.read_config(words)
    vrrl.Policy(*build(cfg.seed), cfg).save(folder)
    policy, began = vrrl.load_policy(folder, cfg), time.time()
    makers = multiprocessing.get_context("spawn").Pool(
        max(1, os.cpu_count() - 1), start_maker, (words, folder))
    for stage, steps, wave, most, peak in STAGES:
        optimizer, seen = vrrl.AdamW(policy), {}
        jobs = [(cfg.seed, stage, step, most) for step in range(1, steps + 1)]
        for step, episodes in enumerate(in_advance(makers, jobs), 1):
            tokens = sum(len(e.actions) for e in episodes)
            for part in vrrl.micro_batches(episodes, BATCH):
                logps, _ = policy.log_probs(part)
                (-torch.cat(logps).sum() / tokens).backward()
                if step % 50 > 44:
                    count_right(part, logps, seen)
            warm = min(1.0, step / 100)
            optimizer.step(peak * warm * (0.55 + 0.45 * math.cos(math.pi * step / wave)))
            if step % 50 == 0 or step == steps:
                shown = {name: round(sum(p) / len(p), 2) for name, p in sorted(seen.items())}
                print(f"{stage} {step}/{steps}, {time.time() - began:.0f} s: {shown}", flush=True)
                seen.clear()
        policy.save(folder)
    makers.terminate()

def count_right(episodes, logps, seen):
    """Collect, by question, the probability of each whole answer."""
    for episode, logp in zip(episodes, logps):
        parts = logp.detach().cpu().split([len(turn.ids) for turn in episode.turns])
        for part, (question, answer) in zip(parts, episode.example["talk"]):
            name = question if question.startswith("say") else "move"
            name += " of a crop" * (name == "say the cells" and "page" in answer)
            seen.setdefault(name, []).append(part.sum().exp().item())

if __name__ == "__main__":
    vrrl.run_main(main, sys.argv[1:])

"""How the weights in assets/embedded were made: `python assets/make_embedded.py [FOLDER] [seed=0]`.
The last stage alone, on a CPU: `python assets/make_embedded.py FOLDER model=OTHER_FOLDER`.

The default model is small enough for a CPU, but it is a real Qwen3-VL, made from a config. It comes
with eyes: as a downloaded VLM has seen pictures of all kinds, this one has learnt to say what is in
pictures of all splits. It is never asked where a target is in a picture, nor for a way:

    say the cells    what is in each cell of a map, and whether a drawn path covers it
    say the path     the moves of a drawn path
    say the point    the coordinates of a point under cross hairs
    say the offset   on a crop: where the red thing lies, "left 3 up 1", "far" or "here"
    check it         the same inside <THINK>, as demonstrations have it
    move left 3 up 1 the coordinates after that move from the last point that was said

Stages 1 to 3 of assets/embedded are from commit 92a0fbd, where small tables filled the canvas."""
import functools, itertools, math, os, random, sys, time
from pathlib import Path

import tokenizers, torch, transformers
from PIL import ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_prep, vrrl

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
    special = [f"<|{name}|>" for name in "endoftext im_start im_end vision_start vision_end "
               "image_pad video_pad unknown".split()]
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

def navigation_talk(rng, pictures):
    """A conversation, [(image, question, answer), ...]: the cells of a map, and paths on it."""
    mixes = [data_prep.random_mix(rng, 0) for _ in range(40)]
    size, look = rng.choice((3, 4, 5, 6, 7)), rng.choice((*data_prep.LOOKS, *mixes))
    holes, cells = round(rng.uniform(0, 0.45) * (size * size - 2)), ["F"] * (size * size)
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
    at, moves, covered, back = start, [], {start}, None
    for _ in range(rng.randint(1, 2 * size)):
        there = {m: (at[0] + down, at[1] + right) for m, (down, right) in data_prep.MOVES.items()}
        weights = [0.1 if cell == back or {-1, size} & {*cell} else 4 if [m] == moves[-1:] else 2
                   for m, cell in there.items()]
        moves += rng.choices([*there], weights)
        at, back = there[moves[-1]], at
        if {-1, size} & {*at}:
            break
        covered.add(at)
    return moves, covered

def draw_hairs(image, point):
    """A copy of the whole picture with cross hairs through a point (x, y) and a ring around it."""
    copy = image.convert("RGB")
    draw = ImageDraw.Draw(copy)
    x, y = round(point[0]), round(point[1])
    thick = max(2, round(max(image.size) / 400))
    draw.line((x, 0, x, image.height), fill=data_prep.MARK, width=thick)
    draw.line((0, y, image.width, y), fill=data_prep.MARK, width=thick)
    draw.circle((x, y), 3 + 2 * thick, outline=data_prep.MARK, width=thick)
    draw.circle((x, y), thick, fill=data_prep.MARK)
    return copy

# Shape, number of parts, whether with look-alikes.
SHAPES = (("bars", (6, 9), False), ("scatter", (10, 16), False), ("table", (4, 7), False),
          ("table", (9, 11), False))
ALIKE = ("bars", (9, 11), True), ("scatter", (18, 28), True), ("table", (10, 14), True)

class Figures(vrrl.Points):
    """Pointing at figures that are made in memory."""
    def __init__(self, cfg):
        self.cfg = cfg
    def image(self, example):
        return example["image"]
    def near(self, rng, point, reach):
        """Another point, at most so far away along each side."""
        return tuple(min(max(c + rng.randint(-reach, reach), 0), 24) for c in point)
    def make(self, rng, shapes):
        """(example, point): mostly a point around which a crop shows the target."""
        shape, size, alike = rng.choice(shapes)
        record, image = data_prep.make_figure(rng, shape, size, alike=alike)
        example = {**record, "size": image.size, "image": image}
        if rng.random() < 0.3:
            return example, self.mistake(example, rng)
        return example, self.near(rng, self.solution(example), 6)

def pointing_talk(rng, pictures, task):
    """One figure: a point on the whole of it, then crops around the point as it moves."""
    example, point = task.make(rng, SHAPES)
    if pictures == 1 and rng.random() < 0.7:  # crops from the first stage on
        shown = task.feedback(example, point)
        if rng.random() < 0.5:
            return [(shown, "say the cells", red_cells(example, point, task))]
        return [(shown, "say the offset", task.thought(example, point))]
    hairs = draw_hairs(example["image"], task.pixel(example, point))
    talk = [(hairs, "say the point", task.say(point))]
    while len(talk) < pictures:
        shown, there = task.feedback(example, point), task.near(rng, point, rng.randint(1, 5))
        move = task.move(point, there)
        if rng.random() < 0.5:
            talk.append((shown, "say the offset", task.thought(example, point)))
        elif move:
            talk.append((shown, f"move {move}", task.say(there)))
            point = there
    return talk

def red_cells(example, point, task):
    """For each 16 x 16 pixels of a crop, row by row, whether they show some of the target."""
    side, (x, y) = task.cfg.points.crop, task.pixel(example, point)
    left, top, (x0, y0, x1, y1) = round(x) - side // 2, round(y) - side // 2, example["box"]
    return " ".join("red" if x0 < c + 16 and x1 > c and y0 < r + 16 and y1 > r else "page"
                    for r in range(top, top + side, 16) for c in range(left, left + side, 16))

def measuring_talks(task, processor):
    """The conversations of the last stage, endlessly. The eyes stay as they are, so each picture is
    made and encoded once. Crops are of any figure, so that the first picture does not help."""
    rng, crops, starts, maps = random.Random("measuring"), [], [], []
    for number in range(12_000):
        example, point = task.make(rng, SHAPES + ALIKE)
        crop = vrrl.Picture(task.feedback(example, point), processor)
        crops.append((crop, task.thought(example, point)))
        if number % 4 == 0:
            hairs = draw_hairs(example["image"], task.pixel(example, point))
            starts.append((vrrl.Picture(hairs, processor), "say the point", task.say(point)))
        if number % 8 == 0:
            maps.append([(vrrl.Picture(image, processor), *rest)
                         for image, *rest in navigation_talk(rng, 3)])
    while True:
        talk = [rng.choice(starts)]
        while len(talk) < 6:
            crop, thought = rng.choice(crops)
            words = thought != "here" and rng.random() < 0.5
            talk.append((crop, "check it", f"<THINK>{thought}</THINK>") if words else
                        (crop, "say the offset", thought))
        yield talk if rng.random() < 0.75 else rng.choice(maps)

def lesson(policy, talk, number):
    """A conversation as an Episode whose answers are all taught; its pictures as Picture or PIL."""
    pictures = [p if isinstance(p, vrrl.Picture) else vrrl.Picture(p, policy.processor)
                for p, _, _ in talk]
    head, asked = policy.prompt(talk[0][1], "").question, {"talk": [rest for _, *rest in talk]}
    episode = vrrl.Episode(asked, policy.place(head, pictures[0]), pictures[0], number)
    for n, (_, _, answer) in enumerate(talk, 1):
        ids = [*policy.encode(answer), policy.end_id]
        turn = vrrl.Turn(ids, [True] * len(ids))
        if n < len(talk):
            turn.picture = pictures[n]
            turn.reply = policy.place(policy.prompt("", talk[n][1]).reply, turn.picture)
        episode.turns.append(turn)
    return episode

# Title, updates, length of the rate's cosine in updates, most pictures, peak of the rate.
STAGES = (("single pictures", 600, 600, 1, 1.5e-3), ("conversations", 400, 1600, 6, 1.5e-3),
          ("more conversations", 300, 420, 6, 1.3e-3))

def make_batch(policy, stage, most, step):
    """The episodes of an update, of at most so many pictures."""
    rng, episodes = random.Random(f"{(policy.cfg.seed, stage, step)}"), []
    for number in range(256):
        pictures = rng.randint(1, most)
        talk = (navigation_talk(rng, pictures) if number % 3 == 0 else
                pointing_talk(rng, pictures, Figures(policy.cfg)))
        episodes.append(lesson(policy, talk, number))
    return episodes

def teach(policy, title, steps, wave, peak, batches):
    """`steps` updates; the rate falls along a cosine of `wave` updates. Prints, by question, the
    probability of a whole answer."""
    optimizer, seen, began = vrrl.AdamW(policy), {}, time.time()
    for step, episodes in zip(range(1, steps + 1), batches):
        tokens = sum(len(e.actions) for e in episodes)
        for part in vrrl.micro_batches(episodes, policy.cfg.policy.micro):
            logps, _ = policy.log_probs(part)
            (-torch.cat(logps).sum() / tokens).backward()
            for episode, logp in zip(part, logps if step % 50 > 44 else ()):
                said = logp.detach().cpu().split([len(turn.ids) for turn in episode.turns])
                for (question, answer), of_turn in zip(episode.example["talk"], said):
                    name = "move" if question.startswith("move") else question
                    name += " of a crop" * (name == "say the cells" and "page" in answer)
                    seen.setdefault(name, []).append(of_turn.sum().exp().item())
        rate = peak * min(1.0, step / 100)
        optimizer.step(rate * (0.55 + 0.45 * math.cos(math.pi * step / wave)))
        if step % 50 == 0 or step == steps:
            shown = {name: round(sum(p) / len(p), 2) for name, p in sorted(seen.items())}
            print(f"{title} {step}/{steps}, {time.time() - began:.0f} s: {shown}", flush=True)
            seen.clear()

def main(words):
    folder = next((Path(word) for word in words if "=" not in word), vrrl.HERE / "assets/embedded")
    words = ["policy.temperature=1.0", "policy.dtype=float32", "policy.micro=48",
             *(word for word in words if "=" in word)]
    cfg, _ = vrrl.read_config(words)
    source = cfg.model
    if not any(word.startswith("model=") for word in words):
        seeing, _ = vrrl.read_config([*words, "policy.freeze_vision=no", "policy.micro=256"])
        vrrl.Policy(*build(cfg.seed), seeing).save(folder)
        source, policy = folder, vrrl.load_policy(folder, seeing)
        for stage, steps, wave, most, peak in STAGES:
            batches = torch.utils.data.DataLoader(  # other processes make them in advance
                range(1, steps + 1), None, collate_fn=functools.partial(
                    make_batch, policy, stage, most), num_workers=max(1, os.cpu_count() - 1))
            teach(policy, stage, steps, wave, peak, batches)
            policy.save(folder)
    policy = vrrl.load_policy(source, cfg)
    talks = measuring_talks(Figures(cfg), policy.processor)
    batches = ([lesson(policy, next(talks), n) for n in range(96)] for _ in itertools.count())
    teach(policy, "measuring", 1000, 1050, 1e-3, batches)
    policy.save(folder)

if __name__ == "__main__":
    vrrl.run_main(main, sys.argv[1:])

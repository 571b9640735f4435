"""What a real model takes on this GPU, with random weights: speed, memory, agreement of log-probs.

    python results/gpu.py [profile=qwen3-vl-4b] [key=value ...]      # 3 minutes on an H200

It saves a model of the profile's size, loads it as `python vrrl.py` does, and takes steps of RL.
Random weights say nothing that can be parsed. So each turn counts as an answer until the turn
limit, and rewards are random numbers.
"""
import json, random, sys, tempfile, time
from pathlib import Path

import torch, transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "assets")]
import make_embedded
import vrrl

# The sizes of Qwen3-VL-4B-Instruct and Qwen2.5-VL-3B-Instruct on the hub.
TEXT4 = dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, head_dim=128,
             num_key_value_heads=8, rope_parameters=dict(
                 rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20]))
VISION4 = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=16,
               out_hidden_size=2560, num_position_embeddings=2304,
               deepstack_visual_indexes=[5, 11, 17])
TEXT3 = dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
             num_key_value_heads=2, rope_parameters=dict(
                 rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
VISION3 = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
               out_hidden_size=2048, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])

def save_random(profile, folder):
    """A folder of random weights of the profile's size, with the embedded model's tokenizer."""
    four = "4b" in profile
    small, tokenizer, processor = make_embedded.build(0)
    ids = {k: v for k, v in small.config.to_dict().items() if k.endswith("token_id") and v}
    text, vision = (TEXT4, VISION4) if four else (TEXT3, VISION3)
    made = transformers.Qwen3VLConfig if four else transformers.Qwen2_5_VLConfig
    config = made(text_config=dict(vocab_size=151936, num_hidden_layers=36, **text,
                                   tie_word_embeddings=True),
                  vision_config=vision, tie_word_embeddings=True, **ids)
    kind = transformers.AutoModelForImageTextToText
    with torch.device(vrrl.device_of(vrrl.read_config()[0])):
        model = kind.from_config(config, dtype=torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")
    side = vision["patch_size"]
    processor = type(processor)(
        size={"shortest_edge": (2 * side) ** 2 * 4, "longest_edge": 1 << 24}, patch_size=side,
        merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)

class Timer:
    """Stands where `Run` does: it takes the steps and prints what each cost."""
    def steps(self, stage, count, optimizer, buffer):
        for step in range(1, count + 1):
            torch.cuda.reset_peak_memory_stats()
            began, self.sampled = time.time(), ""
            yield step
            torch.cuda.synchronize()
            print(f"step {step}: {self.sampled}; in all {time.time() - began:.1f} s, "
                  f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)

    def log(self, **figures):
        print({key: figures[key] for key in ("off_policy", "turns", "kept", "grad_norm", "kl")})

    def play(self, *arguments, **options):
        """`vrrl.play`, timed."""
        began, episodes = time.time(), PLAY(*arguments, **options)
        seconds = time.time() - began
        tokens = sum(len(turn.ids) for e in episodes for turn in e.turns)
        self.sampled = (f"{len(episodes)} rollouts, {tokens} tokens in {seconds:.1f} s "
                        f"({tokens / seconds:.0f} a second), openings of "
                        f"{len(episodes[0].opening[0])} ids, "
                        f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        return episodes

PLAY = vrrl.play

def main(words):
    words = ["profile=qwen3-vl-4b", "make.train=64", "make.test=2", "rl.steps=3", "rl.questions=8",
             "rl.max_turns=3", "policy.max_new=40", *words]
    with tempfile.TemporaryDirectory() as folder:
        cfg, _ = vrrl.read_config(words)
        save_random(cfg.profile, folder)
        cfg, _ = vrrl.read_config([*words, f"model={folder}", f"data={folder}/data"])
        policy, rng, timer = vrrl.load_policy(folder, cfg), random.Random(0), Timer()
        if cfg.rl.kl and not cfg.policy.lora:
            policy.reference = vrrl.load_policy(folder, cfg)
        point = lambda: (rng.randrange(1001), rng.randrange(1001))
        vrrl.read_turn = lambda policy, task, episode, ids, logps=(): vrrl.Turn(
            ids, [True] * len(ids), logps, "answer", None, point())
        vrrl.well_formed = lambda task, turns, unfinished=False: unfinished
        vrrl.reward = lambda task, episode, **numbers: rng.random()
        vrrl.play = timer.play
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                          "transformers": transformers.__version__, "words": words}))
        vrrl.rl(policy, vrrl.TASKS[cfg.task](cfg), cfg, timer)

if __name__ == "__main__":
    vrrl.run_main(main, sys.argv[1:])

"""Paints a picture as assets/loss.png: which turns of three training episodes enter the loss.

    usage: python assets/draw_loss.py MODEL PICTURE.png

The episodes are sampled on training questions, by the model of a folder, such as
runs/grounding-vrrl-seed0/model: one from a question, with two values of k, and one that goes on
from a stored state.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_prep
import vrrl

def row(task, episode, k, label):
    """A turn stands below the picture that it answers. Green: it is in the loss."""
    turns = episode.all_turns
    shown = [task.feedback(episode.example, answer) for answer in episode.answers]
    first = len(episode.given) + k  # number of the first turn in the loss, from 1
    return {"label": label, "images": [task.image(episode.example), *shown][: len(turns)],
            "captions": [turn.text for turn in turns],
            "verdicts": ["right" if n >= first else "" for n in range(1, len(turns) + 1)]}

def corrected(episodes, wrong):
    """The first episode whose only wrong answers are its first `wrong` ones."""
    return next(e for e in episodes if vrrl.well_formed(task, e.all_turns) and
                [task.exact(e.example, a) for a in e.answers] == [False] * wrong + [True])

if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    _, model, picture = sys.argv
    cfg, _ = vrrl.read_config(["policy.temperature=1"])
    task = vrrl.TASKS[cfg.task](cfg)
    policy = vrrl.load_policy(model, cfg)
    starts = [vrrl.begin(policy, task, e, n) for n, e in enumerate(task.examples("train")[:150])]
    luck = vrrl.uniforms(policy, [str(start.group_id) for start in starts], 4, 4)
    fresh = vrrl.play(policy, task, starts, 4, 4, luck)
    buffer = vrrl.Buffer(cfg.buffer.size, cfg.buffer.correct_share)
    for episode in reversed(fresh):
        state = vrrl.state_of(task, episode, cfg.buffer.store, 0)
        if state is not None:
            buffer.add(state)
    questions = {e["id"]: e for e in task.examples("train")}
    starts = [vrrl.begin(policy, task, questions[key], n, spoken)
              for n, (key, spoken, _) in enumerate([*buffer.wrong][:150])]
    rolled = vrrl.play(policy, task, starts, 4, 4, luck[: 4 * len(starts)])
    one, other = corrected(fresh, 1), corrected(rolled, 1)
    rows = [row(task, one, 1, "from a question, k = 1: every turn is in the loss"),
            row(task, one, 2, "the same episode with k = 2: prefix masking leaves out turn 1"),
            row(task, other, 1, "a roll-in: it goes on from a stored wrong state, which is given")]
    data_prep.film_strip(picture, rows, "Green: in the loss", most=3)

"""VRRL in one file: visually grounded self-reflection for vision-language models, learnt by RL.

The idea (Tang, Yin, Durrett, arXiv 2607.02490). A vision-language model (VLM) answers a question
about a picture, is shown what its answer does in the picture, and then commits or corrects. Plain
RL makes first answers better. Corrections then become rare, and the policy forgets how to make
them. Where pictures are new, first answers fail, and nothing mends them.
VRRL makes the policy practise corrections: prefix masking (random turn masking, RTM) trains later
turns, and buffered roll-ins start from past answers: wrong ones to correct, right ones to commit.

The algorithm, with the default of each number beside its name (task `grounding`):

    policy pi: a VLM after SFT: sft.first_steps 450 on first answers, sft.steps 40 on demonstrations
    D: two queues of states, wrong and correct   (buffer.size 4000, buffer.correct_share 0.3)
    repeat rl.steps 400 times:
        for each of rl.questions 32 questions:
            with probability rl.rho 0.6: start = the question
            else a roll-in in its place: start = the oldest state of D's correct queue (probability
                0.3) or of its wrong queue; if that queue is empty, the question
            sample rl.samples G = 8 rollouts at policy.temperature 0.5, each of at most
                rl.max_turns 3 new turns; a well-formed answer gets a feedback picture, except in
                the last of these turns
            R_i = 0 if malformed; 1 if correct, less reward.revision 0.05 for each revision; else
                (0.1 + 0.9 r_i) / 2; r_i in [0, 1]: how much closer they got after the first answer
            A_i = R_i - mean of the other G - 1 rewards    (REINFORCE with a baseline)
            fresh rollouts only: k ~ U{1..T} of the T turns; turns before k are taken out of the
                loss (each rollout draws its k)
        one Adam step (rl.lr 1e-4) on  - 1/(32 G) sum_i A_i sum of log pi over tokens in the loss
        D.append(each fresh rollout up to its first shown wrong answer; if none, its last shown one)
        D.append(each roll-in up to its first new shown wrong answer, if the state then has at most
            buffer.depth 2 answers)
        D.append(each wrong state that was taken, unless all 8 rollouts ended on a correct answer)

An *episode* is one question with all its turns. A *rollout* is one that the policy sampled. A
*roll-in* is one that goes on from a stored state: the turns of the state are given, and no loss
trains them. All other rollouts are *fresh*.

*Malformed* is what breaks the protocol: turn 1 is an ANSWER alone, each turn between is a THINK and
an ANSWER that is new, and the last is a FINAL alone. One that never says FINAL is malformed too.

Plain RL is the same with reward.reflection=no (1 if correct, else 0), rl.mask=none and rl.rho=1.

*What the step does beside.* The rate rises for 20 steps and then falls to a tenth along a line. The
gradient's norm is clipped to 1. The paper's GRPO also divides A by the group's standard deviation
(here with rl.std_norm=yes), and clips the importance ratio. Here that ratio is 1, because each
batch is used once. rl.kl (0 by default) adds a KL term. README.md lists what else differs.

How to read this file. Part I is the method: 1 turns, 2 rollouts, 3 reward, 4 buffer, 5 loss, 6 the
loop. It can be read alone: the table at its head says what it calls. Part II is what it stands on:
7 policy (the VLM), 8 tasks, 9 optimizer and SFT, 10 evaluation, 11 settings, 12 a run. A first
reader may skip Part II; whoever changes something finds the place in README.md. `python vrrl.py
--help` lists all settings.
"""
import contextlib, dataclasses, datetime, difflib, functools, hashlib, inspect, itertools
import json, math, os, platform, random, re, shutil, sys, time, types
from collections import Counter, deque, namedtuple
from pathlib import Path

import numpy as np
import torch, transformers, yaml
from PIL import Image
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen_images
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import data_prep
from data_prep import UserError, write_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent

# ####################################### Part I: the method #######################################
#
# What it calls of Part II:
#
#   task.examples("train")           the examples; each is a dict with an id
#   task.image(example)              the picture of a question
#   task.question(example)           (text with that picture, text with each feedback picture)
#   task.parse(text, last)           the answer that a text states, or None
#   task.exact(example, answer)      whether an answer is correct
#   task.progress(example, answer)   how close it is to correct: p in [0, 1], for the reward
#   task.same(answer, other)         whether two answers count as one; near points do
#   task.feedback(example, answer)   a picture of what an answer does
#   policy.prompt(question, reply)   the same two as ids: its fields `question` and `reply`
#   policy.place(ids, picture)       the same with as many image tokens as the picture takes
#   policy.decode(ids)               the text of a turn; policy.end_id is the token that ends it
#   policy.open(episodes)            a Context, in which the model has read up to the new turns
#   policy.sample(context, luck)     one new turn for each of them: ids and log-probs
#   context.take(places)             keep some of them
#   context.rows                     the row of the batch that each is in; those of one start that
#                                    have said the same so far share a row
#   policy.read(context, texts)      let each of them read on
#   policy.log_probs(episodes)       log-probs of their `actions`, at the temperature of sampling,
#                                    with gradients; and entropies
#   policy.reference_log_probs(...)  log-probs of the same tokens under the SFT model
#   Picture(image, processor)        an image as the model's vision tower takes it
#   uniforms(policy, names, ...)     random numbers that depend on the names alone
#   batch_of(items, count, ...)      the next items, in endless shuffled passes
#   micro_batches(episodes, size)    slices of them
#   AdamW(policy).step(rate)         sums the workers' gradients, clips them, updates, and clears
#                                    them; returns their norm
#   share(items), gather(items)      this worker's part of a list; the parts of all workers
#   outcome, health, update_...      figures for the log
#   run.steps(...), run.log(...)     steps 1, 2, ..., with checkpoints; a line of the log
#   run.lap(name)                    the seconds since the last lap, for the log

# ==================== 1. Turns ====================================================================
# In each turn the policy says one ANSWER or one FINAL; before an ANSWER that revises one stands a
# THINK, in words of its own. After each ANSWER the user shows a picture of what it does. In the
# task `grounding` an answer is a point, x and y, and one that revises it may be a move from there.
# An episode that is corrected once reads so:
#     <ANSWER>12 7</ANSWER>
#     <THINK>left 3 up 1</THINK><ANSWER>left 3 up 1</ANSWER>
#     <FINAL></FINAL>
TAGS = ["<THINK>", "</THINK>", "<ANSWER>", "</ANSWER>", "<FINAL>", "</FINAL>"]
NO_TAG = f"((?:(?!{'|'.join(TAGS)}).)*)"  # any text in which no tag stands
THINK = rf"\s*(?:<THINK>{NO_TAG}</THINK>\s*)?"
PROPOSAL = rf"(?:<ANSWER>{NO_TAG}</ANSWER>|<FINAL>{NO_TAG}</FINAL>)\s*"
TURN = re.compile(THINK + PROPOSAL, re.DOTALL)

def parse_turn(task, text, last=None):
    """What a turn says: (kind, thought, answer).

    kind is "answer", "final" or "bad". thought is None without a THINK. last is the answer before
    this turn. A revision may be given as a move from there. A FINAL commits it: it is empty, or
    states that answer in full. Bad is a turn that cannot be read; malformed is a whole episode
    that is out of order, see `well_formed`.
        parse_turn(task, "<THINK>up 1</THINK><ANSWER>4 7</ANSWER>") == ("answer", "up 1", (4, 7))
        parse_turn(task, "<FINAL></FINAL>", last=(4, 7)) == ("final", None, None)
    """
    # Nothing else may stand in a turn, and no tag within another.
    match = TURN.fullmatch(text)
    if match is None:
        return "bad", None, None

    # An ANSWER counts if the task can read it.
    thought, proposed, final = match.groups()
    if final is None:
        answer = task.parse(proposed, last)
        kind = "bad" if answer is None else "answer"
        return kind, thought, answer

    # A FINAL counts if there is an answer to commit, and if it names no other.
    if last is None:
        return "bad", thought, None
    commits = not final.strip() or task.parse(final) == last
    kind = "final" if commits else "bad"
    return kind, thought, None

@dataclasses.dataclass
class Turn:
    """One turn of the policy, and what the user shows after it.

    It keeps the token ids that were sampled. These are trained, never a text that was decoded and
    encoded again, which may have other ids.
    """
    # The sampled ids, with the token that ends a turn, unless it was cut off at policy.max_new.
    ids: list
    # For each id: may it enter a loss? In RL all may. In SFT what is taught may.
    loss_tokens: list
    # For each id: the log-prob with which it was sampled.
    logps: list = ()
    # What `parse_turn` found in the text.
    kind: str = "answer"
    thought: str | None = None
    answer: object = None
    text: str = ""
    # What the user says next: ids, and a Picture in their midst. Without feedback there is neither.
    reply: list = ()
    picture: object = None

@dataclasses.dataclass
class Episode:
    """A conversation about one example: the question, perhaps given turns, and then new turns.

    The new turns are sampled and trained. The given ones belong to a roll-in: they were sampled
    before, and nothing about them is trained.
    """
    example: dict
    question_ids: list
    question_picture: object
    # The rollouts of one start have one number. What stands before their new turns is the same.
    group_id: int = 0
    given: list = dataclasses.field(default_factory=list)
    turns: list = dataclasses.field(default_factory=list)
    # What sections 3 and 5 make of a rollout; weights: one for each token of `actions`.
    reward: float = 0.0
    advantage: float = 0.0
    weights: list = ()

    @property
    def all_turns(self):
        """Given turns and new turns, in the order in which they were said."""
        return [*self.given, *self.turns]

    @property
    def answers(self):
        """The answers so far, given ones too. A FINAL adds none: it commits the last one."""
        return [turn.answer for turn in self.all_turns if turn.kind == "answer"]

    @property
    def opening(self):
        """(ids, pictures) of all that stands before the first new token."""
        ids = list(self.question_ids)
        pictures = [self.question_picture]
        for turn in self.given:
            ids += turn.ids
            ids += turn.reply
            pictures.append(turn.picture)
        return ids, pictures

    @property
    def rest(self):
        """(ids, pictures) of the new turns and of the feedback between them."""
        ids = []
        pictures = []
        for turn in self.turns:
            ids += turn.ids
            ids += turn.reply
            if turn.picture is not None:
                pictures.append(turn.picture)
        return ids, pictures

    @property
    def actions(self):
        """The tokens that may enter a loss: for each (its place in the ids of `rest`, its turn).

        Turns count from 1. New turns of 2 tokens and of 1 token, with 3 tokens of feedback between
        them, give [(0, 1), (1, 1), (5, 2)].
        """
        found = []
        place = 0
        for number, turn in enumerate(self.turns, 1):
            for offset, may in enumerate(turn.loss_tokens):
                if may:
                    found.append((place + offset, number))
            place += len(turn.ids) + len(turn.reply)
        return found

    @property
    def sampled_logps(self):
        """The log-probs with which the new tokens were sampled, as long as `actions` in RL."""
        return [logp for turn in self.turns for logp in turn.logps]

def well_formed(task, turns, unfinished=False):
    """Whether turns keep to the protocol. What does not is malformed, and earns 0.

    Turn 1 is an ANSWER without THINK. Each revision is a THINK and an ANSWER. No ANSWER repeats an
    earlier one. One FINAL stands at the end, without THINK. With a letter for each turn: A T* F.
    unfinished: more turns may follow, so that A T*, or nothing yet, is well-formed as well.
    """
    # The form, a letter a turn; x is what fits nowhere.
    letters = {("answer", False): "A", ("answer", True): "T", ("final", False): "F"}
    form = ""
    for turn in turns:
        has_thought = turn.thought is not None
        form += letters.get((turn.kind, has_thought), "x")
    # Both the form and the answers have to be in order.
    wanted = "(AT*F?)?" if unfinished else "AT*F"
    answers = [turn.answer for turn in turns if turn.kind == "answer"]
    return bool(re.fullmatch(wanted, form)) and not repeats(task, answers)

def repeats(task, answers):
    """Whether two of the answers count as the same. Else a policy could say one answer again and
    again, or earn by going back and forth, where losses count less than gains (reward.worse)."""
    return any(task.same(one, other) for one, other in itertools.combinations(answers, 2))

# ==================== 2. Rollouts =================================================================
# An episode begins with a question, or with a stored state: a question and the turns that were
# given. From such a start `play` samples new turns. After each answer the task draws what it does,
# and the policy goes on from that picture.
def begin(policy, task, example, group_id=0, spoken=(), feedback=None, image=None):
    """An Episode before its first new turn.

    group_id: its number among the starts of a step. spoken: the ids of each given turn.
    Probes (section 10) show other feedback to given turns, or another image as the question's.
    """
    # The question: a text and its picture.
    prompt = policy.prompt(*task.question(example))
    picture = Picture(image or task.image(example), policy.processor)
    ids = policy.place(prompt.question, picture)
    episode = Episode(example, ids, picture, group_id)

    # The given turns, each with the feedback that it gets.
    for turn_ids in spoken:
        turn = read_turn(policy, task, episode, turn_ids)
        reply(policy, task, episode, turn, feedback)
        episode.given.append(turn)
    return episode

def read_turn(policy, task, episode, ids, logps=()):
    """The next Turn of an episode, from its ids. It is bad if it was cut off at policy.max_new."""
    # A revision may be told from the answer before it.
    answers = episode.answers
    last = answers[-1] if answers else None
    text = policy.decode(ids)
    kind, thought, answer = parse_turn(task, text, last)

    # What was cut off may look like a turn by chance. It is none.
    if ids[-1] != policy.end_id:
        kind, thought, answer = "bad", None, None
    loss_tokens = [True] * len(ids)
    return Turn(ids, loss_tokens, logps, kind, thought, answer, text)

def reply(policy, task, episode, turn, feedback=None):
    """Put the user's reply to an answer into its turn: the feedback picture and a text.

    feedback(example, answer) draws the picture. It is the task's own, but for probes.
    """
    # A picture of what the answer does.
    draw = feedback or task.feedback
    image = draw(episode.example, turn.answer)

    # The ids that the policy reads: a text with this picture in it.
    prompt = policy.prompt(*task.question(episode.example))
    turn.picture = Picture(image, policy.processor)
    turn.reply = policy.place(prompt.reply, turn.picture)

@torch.no_grad()
def play(policy, task, starts, samples, max_turns, luck=None, training=False):
    """Roll out `samples` episodes from every start. Those of one start stand together.

    starts: Episodes without new turns, each with another `group_id`. max_turns: of new turns.
    luck: random numbers (episodes, turns, tokens), see `uniforms`; None: greedy, for evaluation.
    training: end an episode as soon as it is malformed, since it earns 0 whatever follows.
    """
    # As many starts at once as policy.rows 256 allows.
    at_once = max(1, policy.cfg.policy.rows // samples)
    played = []
    for first in range(0, len(starts), at_once):
        # G episodes of each start. They share its opening, and each gets turns of its own.
        episodes = []
        for start in starts[first : first + at_once]:
            for _ in range(samples):
                episodes.append(dataclasses.replace(start, turns=[]))

        # The random numbers of these episodes.
        own_luck = None
        if luck is not None:
            own_luck = luck[len(played) : len(played) + len(episodes)]
        play_together(policy, task, episodes, max_turns, own_luck, training)
        played += episodes
    return played

def play_together(policy, task, episodes, max_turns, luck, training):
    """Sample the turns of these episodes, side by side in one batch, until all have ended."""
    context = policy.open(episodes)
    # Which of the episodes go on.
    live = list(range(len(episodes)))
    for turn_number in range(max_turns):
        # All that go on say one turn each.
        turn_luck = None if luck is None else luck[live, turn_number]
        spoken = policy.sample(context, turn_luck)

        # Each turn is parsed and judged, and an answer gets its feedback. Every episode has sampled
        # a turn of its own. Where some of one start have said exactly the same so far, they are one
        # row of the context, and share one Turn here.
        at_limit = turn_number + 1 == max_turns
        turns = {}
        for n, row, (ids, logps) in zip(live, context.rows, spoken):
            if row not in turns:
                turns[row] = next_turn(policy, task, episodes[n], ids, logps, at_limit, training)
            episodes[n].turns.append(turns[row])

        # Those that have ended are taken out of the batch. The others read the feedback.
        going = [place for place, n in enumerate(live) if episodes[n].turns[-1].picture is not None]
        if not going:
            return
        context.take(going)
        live = [live[place] for place in going]
        last_turns = [episodes[n].turns[-1] for n in live]
        policy.read(context, [(turn.reply, [turn.picture]) for turn in last_turns])

def next_turn(policy, task, episode, ids, logps, at_limit, training):
    """The next Turn of an episode, from what was sampled. If it goes on, the turn has its reply.

    It ends with a FINAL, with a turn that cannot be parsed, or at the limit of turns; in training
    also where it is malformed.
    """
    turn = read_turn(policy, task, episode, ids, logps)
    if turn.kind != "answer" or at_limit:
        return turn
    turns = [*episode.all_turns, turn]
    if well_formed(task, turns, unfinished=True) or not training:
        reply(policy, task, episode, turn)
    return turn

# ==================== 3. Reward ===================================================================
def reward(task, episode, *, reflection, bonus, cost, worse, revision):
    """R of an episode, given answers included. The numbers are the settings `reward`.

        malformed, or the turn limit without FINAL:  R = 0
        the last answer is wrong:                    R = max(0, R_refl) / 2
        it is correct:                               R = max(1, R_refl) - late
        R_refl = 0.1 + 0.9 r  [+ bonus * r if correct]  - cost * number of turns
        r      = clip(sum_t w(p_(t+1) - p_t), 0, 1),   w(d) = d if d >= 0 else worse * d
        late   = min(revision * (number of answers - 1), 0.4)

    p_t is `task.progress` of answer t; with worse = 1 that makes r = last p - first p, clipped.
    Given turns and the FINAL count as turns too. Plain RL (reflection no) has 1 if correct, else 0.
    Defaults in grounding: bonus 0, cost 0, worse 1; in navigation: bonus 0.2, cost 0.05, worse 0.5;
    in both: revision 0.05.

    Example, grounding: p = 0.2 and then correct earns 1 - 0.05 = 0.95; p = 0.2 and then p = 0.6,
    wrong, earns (0.1 + 0.9 * 0.4) / 2 = 0.23.
    Example, navigation: a first answer of no progress (p = 0) is revised to a correct one (p = 1).
    So r = 1, and three turns give R_refl = 0.1 + 0.9 + 0.2 - 3 * 0.05 = 1.05. That is more than 1,
    and R = 1.05 - 0.05 = 1.00, as much as for being correct at once.

    The paper has R = max(1 if correct else 0, R_refl). Two things differ here. There an answer just
    beside the target earns up to 1; here a wrong episode earns at most 1/2, and a correct one that
    is well-formed at least 0.6, so that the last small step always pays. And `late` is new (the
    code that the authors released takes 0.01 for each revision): without it an error that is surely
    mended is free in grounding, and pays 1.05 in navigation, so that a policy may err on purpose.
    """
    if not well_formed(task, episode.all_turns):
        return 0.0

    # Is the last answer correct?
    answers = episode.answers
    correct = task.exact(episode.example, answers[-1])
    if not reflection:
        return float(correct)

    # r: how much closer the answers got, all in all.
    p = [task.progress(episode.example, answer) for answer in answers]
    gain = 0.0
    for before, after in itertools.pairwise(p):
        change = after - before
        gain += change if change >= 0 else worse * change
    r = min(1.0, max(0.0, gain))

    # R_refl, and what a correct answer loses for coming late.
    r_refl = 0.1 + 0.9 * r - cost * len(episode.all_turns)
    if not correct:
        return max(0.0, r_refl) / 2
    late = min(revision * (len(answers) - 1), 0.4)
    return max(1.0, r_refl + bonus * r) - late

# ==================== 4. Buffer ===================================================================
# Past answers to start roll-ins from. Plain RL rarely sees a correction: late in training nearly
# all first answers are correct. A buffer of states keeps the failures of the past at hand. What is
# practised should vary and should not run out. So a wrong state comes again until all G rollouts
# from it end on a correct answer, and roll-ins store new wrong states. A correct one is used once.
def state_of(task, episode, store, depth):
    """The state that a rollout stores in the buffer, or None.

    A state is (example id, ids of each turn, whether the last answer is correct). It ends where
    the policy had seen the feedback to an answer, and had to commit or correct.
    store=drawn, the default: after the first new wrong answer that got feedback (was drawn); if
    none was wrong, after the last answer that got it. store=committed, as in the paper: before the
    FINAL.
        wrong, correct, FINAL    drawn: (wrong)      committed: (wrong, correct)
        correct, FINAL           drawn: (correct)    committed: (correct)
        wrong, no FINAL          drawn: (wrong)      committed: None
    depth: a roll-in stores only wrong states, and only those of at most so many answers, given ones
    counted. After more of them few other answers are left to try.
        given wrong; wrong, correct, FINAL    depth 2: (wrong, wrong)    depth 1 or 0: None
    """
    # The new turns that got feedback. They come first: only the last turn of an episode has none.
    shown = [turn for turn in episode.turns if turn.picture is not None]
    if not shown:
        return None
    verdicts = [task.exact(episode.example, turn.answer) for turn in shown]

    # How many of them belong to the state.
    length = len(shown)
    if store == "committed" and episode.turns[-1].kind != "final":
        return None
    if store == "drawn" and False in verdicts:
        length = verdicts.index(False) + 1
    correct = verdicts[length - 1]
    ids = [turn.ids for turn in [*episode.given, *shown[:length]]]

    # Of a roll-in only short wrong states are stored.
    if episode.given and (correct or len(ids) > depth):
        return None
    return episode.example["id"], ids, correct

def states_of(task, group, store, depth):
    """The states that the rollouts of one start store. A wrong state that they started from is
    among them, to be practised again, unless the last answer of each is correct."""
    # What each rollout stores for itself.
    states = [state_of(task, rollout, store, depth) for rollout in group]

    # A roll-in: the state that all of them started from.
    first = group[0]
    if first.given:
        mended = [task.exact(rollout.example, rollout.answers[-1]) for rollout in group]
        wrong = not task.exact(first.example, first.given[-1].answer)
        if wrong and not all(mended):
            ids = [turn.ids for turn in first.given]
            states.append((first.example["id"], ids, False))
    return [state for state in states if state is not None]

class Buffer:
    """Two queues of states: `wrong` ones to correct, and `correct` ones, to practise stopping too.

    correct_share: the share of correct states, of the `size` places and of what is taken. One
    queue for both would fill up with correct states as the policy gets better. First in, first
    out: when a queue is full its oldest state falls out.
    """
    def __init__(self, size, correct_share):
        places = round(size * correct_share)
        self.correct_share = correct_share
        self.correct = deque(maxlen=places)
        self.wrong = deque(maxlen=size - places)

    def add(self, state):
        """Put a state at the end of its queue, unless it is there. Equal rollouts have equal
        states, and the queue would fill with them."""
        _, _, correct = state
        queue = self.correct if correct else self.wrong
        if state not in queue:
            queue.append(state)

    def take(self, rng):
        """The oldest state of one of the queues, or None where that queue is empty."""
        queue = self.wrong
        if rng.random() < self.correct_share:
            queue = self.correct
        return queue.popleft() if queue else None

# ==================== 5. Loss =====================================================================
# REINFORCE: the gradient of E[R] is E[sum_j (R - b) grad log pi(y_j)], summed over the tokens y_j.
# A baseline b that does not depend on the actions drops out of the expectation, since
# E[grad log pi] = 0, and it lowers the variance. The mean reward of the other rollouts of the same
# start is such a baseline.
#
# Under prefix masking it does not drop out. Turn t of T new turns has the weight t/T on average. T
# depends on what the policy does in turn t and later, since a commit ends the episode. So the
# weight depends on the actions too, and E[weight * grad log pi] is not 0: early turns of long
# episodes count less. This bias is the price of the mask, and part of the paper's method: more of
# the gradient goes to later turns, where corrections are made.
#
# Roll-ins have no mask. Their given turns are in no loss, and all their new tokens weigh 1, so that
# the baseline holds. With rl.mask=none it holds for fresh rollouts too.
def turn_weights(group, mask, seed):
    """Prefix masking (paper: random turn masking): the weights of the rollouts of one start.

    Returns a list for each rollout, with a weight for each token of `actions`. Of T new turns
        none: all tokens weigh 1
        random: k ~ U{1..T} is drawn for each rollout; turns k..T weigh 1, those before k weigh 0
        expected: turn t weighs t/T, the mean of `random`
    T may differ within the group. A roll-in weighs 1. Two turns of one token each: random gives
    [1, 1] or [0, 1], expected [0.5, 1]. seed: a text; with the start and the rollout's place it
    decides k.
    """
    weights = []
    for place, rollout in enumerate(group):
        # The weight of each turn.
        total = len(rollout.turns)
        of_turn = [1.0] * total
        if mask == "random" and not rollout.given:
            k = random.Random(f"{seed} {rollout.group_id} {place}").randint(1, total)
            of_turn = [float(t >= k) for t in range(1, total + 1)]
        if mask == "expected" and not rollout.given:
            of_turn = [t / total for t in range(1, total + 1)]

        # A token weighs what its turn weighs.
        weights.append([of_turn[t - 1] for _, t in rollout.actions])
    return weights

def advantages(rewards, std_norm=False):
    """A_i = R_i - mean reward of the other rollouts of its group: (groups, G) -> (groups, G).

    This equals G / (G - 1) times (R_i - mean of all G). Rewards 1, 0, 0 give 1, -0.5, -0.5.
    std_norm: divided by the group's standard deviation too. GRPO has this without G / (G - 1).
    """
    # In fp64, so that equal rewards give 0: in fp32 the mean of equal numbers may differ from them.
    rewards = rewards.double()
    group = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    found = centred * group / (group - 1)
    if std_norm:
        found = found / (rewards.std(1, keepdim=True) + 1e-6)
    return found

def kl_terms(logp, reference):
    """q - log q - 1 of each token, q = pi_SFT / pi: (tokens,) -> (tokens,).

    The mean of its value is KL(pi || pi_SFT). Its gradient is that of KL(pi_SFT || pi), as in GRPO.
    """
    log_q = reference - logp
    return log_q.exp() - log_q - 1

def policy_loss(episodes, logps, rollouts, references=None, kl=0.0):
    """L = 1/N sum_i [ - A_i sum_j m_ij log pi(y_ij)  +  kl sum_j (q_ij - log q_ij - 1) ].

    logps, references: a (tokens,) tensor for each episode. The episode holds A_i and the m_ij.
    rollouts: N, of the whole step, so that the losses of its micro-batches add up to its loss.

    N does not depend on the mask. Divided by the tokens in the loss, which depend on k, `random`
    would not average to `expected`. The KL term covers the masked turns of these episodes too, or
    they could drift.
    """
    loss = 0.0
    for number, (episode, logp) in enumerate(zip(episodes, logps)):
        weights = logp.new_tensor(episode.weights)
        loss = loss - episode.advantage * (weights * logp).sum()
        if kl:
            loss = loss + kl * kl_terms(logp, references[number]).sum()
    return loss / rollouts

# ==================== 6. The loop =================================================================
def rl(policy, task, cfg, run):
    """The algorithm at the head of this file, from the SFT model `policy`.

    run: the folder that keeps log and checkpoints; a run that was stopped goes on from the last
    one. With several workers each plays a share of the starts, and gradients are summed; alone,
    `share` and `gather` hand back what they are given.
    """
    settings = cfg.rl
    samples = settings.samples  # G
    rollouts = settings.questions * samples  # N
    examples = {example["id"]: example for example in task.examples("train")}
    optimizer = AdamW(policy)
    buffer = Buffer(cfg.buffer.size, cfg.buffer.correct_share)
    for step in run.steps("rl", settings.steps, optimizer, buffer):
        # All that is random in a step depends on this text, and not on what came before. So a run
        # that was stopped goes on as if it had not been.
        seed = f"{cfg.seed} {step}"

        # 1. Starts: a question, or a state in which the policy had to commit or correct. A roll-in
        #    comes in the place of a question, and where its queue is empty the question stays.
        rng = random.Random(seed)
        plan = []
        for example_id in batch_of(list(examples), settings.questions, step, cfg.seed):
            state = None
            if rng.random() >= settings.rho:
                state = buffer.take(rng)
            plan.append(state or (example_id, (), None))
        starts = []
        for number, state in share(list(enumerate(plan))):
            example_id, spoken, _ = state
            start = begin(policy, task, examples[example_id], number, spoken)
            starts.append(start)

        # 2. G rollouts from each start, turn by turn. What is sampled depends on seed, step, start
        #    and rollout alone.
        most = settings.max_turns
        names = [f"{seed} {start.group_id}" for start in starts]
        luck = uniforms(policy, names, samples, most)
        episodes = play(policy, task, starts, samples, most, luck, training=True)
        groups = [episodes[n : n + samples] for n in range(0, len(episodes), samples)]
        run.lap("sampling")

        # 3. Rewards, the advantage of each rollout within its group, and prefix masking.
        for episode in episodes:
            episode.reward = reward(task, episode, **vars(cfg.reward))
        for group in groups:
            rewards = torch.tensor([[rollout.reward for rollout in group]])
            advantage = advantages(rewards, settings.std_norm)[0]
            weights = turn_weights(group, settings.mask, seed)
            for place, rollout in enumerate(group):
                rollout.advantage = advantage[place].item()
                rollout.weights = weights[place]

        # 4. The gradient, a micro-batch at a time, for memory. Where A is 0, as in groups of equal
        #    rewards, a rollout teaches nothing. It is left out, of the KL term too (as in the
        #    paper).
        kept = [episode for episode in episodes if abs(episode.advantage) > 1e-6]
        sums = Counter()
        for part in micro_batches(kept, cfg.policy.micro):
            logps, entropies = policy.log_probs(part)
            references = policy.reference_log_probs(part) if settings.kl else None
            loss = policy_loss(part, logps, rollouts, references, settings.kl)
            loss.backward()
            sums.update(update_figures(part, logps, entropies, references))

        # 5. One step, at a rate that rises and then falls. Where no rollout of any worker has an
        #    advantage it is skipped: Adam's momentum alone would still move the weights.
        rise = step / 20
        fall = 1 - 0.9 * (step - 20) / max(1, settings.steps - 20)
        rate = settings.lr * min(rise, fall)
        skipped = not any(gather([bool(kept)]))
        norm = 0.0 if skipped else optimizer.step(rate)
        run.lap("updating")

        # 6. States for later roll-ins, and a line in the log.
        states = []
        for group in groups:
            states += states_of(task, group, cfg.buffer.store, cfg.buffer.depth)
        for state in gather(states):
            buffer.add(state)
        outcomes = [outcome(task, episode) for episode in episodes]
        run.log(
            **health(gather(outcomes)),
            **update_averages(gather([sums]), rollouts),
            wrong_states=len(buffer.wrong),
            correct_states=len(buffer.correct),
            skipped=int(skipped),
            grad_norm=norm,
            lr=rate,
        )

# ############################### Part II: what the method stands on ###############################

# ==================== 7. Policy ===================================================================
# The VLM, with what it takes to read a conversation with pictures in it, to sample a turn, and to
# score what was sampled. A conversation is read once: the model keeps keys and values of all that
# it has read (the cache of a Context), and reads on from there.
#
# Version 5.24 of the library renamed the argument that takes the cache of keys and values.
CACHE_NAMES = inspect.signature(Qwen3VLTextModel.forward).parameters
CACHE = "cache" if "cache" in CACHE_NAMES else "past_key_values"
MARK = "\ue000"  # stands for the policy's words in a chat template; a character that no text has
TAG = re.compile(f"({'|'.join(TAGS)})")
Prompt = namedtuple("Prompt", "question end_id reply")  # see Policy.prompt

def recompute(function, *inputs):
    """function(*inputs), computed again in the backward pass instead of keeping what it made."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

def size_seen(size, processor):
    """(width, height) in pixels that an image of this size has when the model sees it."""
    width, height = size
    token_side = processor.patch_size * processor.merge_size
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]  # in all, pixels
    height, width = qwen_images.smart_resize(height, width, token_side, least, most)
    return width, height

class Picture:
    """An image as the vision tower takes it.

    grid: visual tokens (down, across). patches: uint8 (down * across * merge^2, 3, patch^2) in the
    library's order: the merge^2 patches of a token stand together. patch_grid: (frames, rows,
    columns) of patches. features: what a frozen vision tower made of it, kept for the next time.
    """
    def __init__(self, image, processor):
        # The picture at the size that the model sees, a whole number of tokens along each side.
        patch, merge = processor.patch_size, processor.merge_size
        width, height = size_seen(image.size, processor)
        down, across = height // (patch * merge), width // (patch * merge)
        pixels = np.asarray(image.resize((width, height), processor.resample))
        # Cut it into patches, and put those of a token together.
        pixels = pixels.reshape(down, merge, patch, across, merge, patch, 3)
        pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5)
        self.patches = pixels.reshape(-1, 3, patch * patch)
        self.grid = (down, across)
        self.patch_grid = (1, down * merge, across * merge)
        self.features = None

    @property
    def tokens(self):
        """How many visual tokens it takes."""
        return math.prod(self.grid)

class Context:
    """Conversations as far as the model has read them.

    Those that are equal so far are one row of the batch: conversation n is row `rows[n]` of B. A
    policy that is sure of itself says few different things, so this saves most of the work.

    Rows of different length share columns: where a row has no token, `valid` (B, L) is False, and
    attention skips the column. position (B,): the next M-RoPE position. last (B, D): the hidden
    state that predicts a row's next token. cache: keys and values of all columns.
    """
    def __init__(self, rows, device):
        self.rows = list(range(rows))
        self.cache = transformers.DynamicCache()
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.last = None

    def take(self, conversations):
        """Keep these conversations, in this order."""
        self.group([(self.rows[n], None) for n in conversations])

    def group(self, keys):
        """Conversations of equal keys are one row from now on. keys: for each conversation (its row
        so far, what it says next). Returns the key of each row."""
        # Number the rows in the order in which their first conversations come.
        number = {}
        for key in keys:
            number.setdefault(key, len(number))
        self.rows = [number[key] for key in keys]
        # Each new row goes on from an old one. Mostly nothing has changed, and nothing is copied.
        old = [row for row, _ in number]
        if old != list(range(len(self.valid))):
            old = torch.tensor(old, device=self.valid.device)
            self.cache.batch_select_indices(old)
            self.valid, self.position = self.valid[old], self.position[old]
            self.last = self.last.index_select(0, old)
        return list(number)

    def add_columns(self, new):
        """Make room for W tokens a row, `new` (B, W). Returns the attention mask (B, 1, W, L + W):
        a new token sees what came before it in its row, and itself."""
        past, width = self.valid.shape[1], new.shape[1]
        self.valid = torch.cat([self.valid, new], 1)
        column = torch.arange(past + width, device=new.device)
        not_later = column <= column[past:, None]
        return self.valid[:, None, None, :] & not_later

    def advance(self, new, positions, hidden):
        """Move on behind the last new token of each row; a row without one stays where it is.
        positions (3, B, W) and hidden (B, W, D) are those of the new tokens."""
        # The place of each row's last new token.
        row = torch.arange(len(new), device=new.device)
        end = (new.sum(1) - 1).clamp(min=0)
        # What follows it has the next position on all three axes.
        has_new = new.any(1)
        after = positions.amax(0)[row, end] + 1
        self.position = torch.where(has_new, after, self.position)
        last = hidden[row, end]
        if self.last is not None:
            last = torch.where(has_new[:, None], last, self.last)
        self.last = last

class Adapters:
    """Low-rank adapters, for small cards (Hu et al., arXiv 2106.09685).

    Each linear map of the language model computes W x + B A x. A (rank, in) and B (out, rank)
    alone are trained, and B is 0 at first. While `on` is False it computes W x.
    """
    def __init__(self, model, rank):
        # All workers have the same adapters at first, and the model itself stays as it is.
        torch.manual_seed(0)
        self.on = True
        model.requires_grad_(False)
        for linear in model.model.language_model.layers.modules():
            if isinstance(linear, torch.nn.Linear):
                weight = linear.weight
                a = torch.randn_like(weight.new_empty(rank, linear.in_features))
                linear.a = torch.nn.Parameter(a / linear.in_features ** 0.5)
                linear.b = torch.nn.Parameter(weight.new_zeros(linear.out_features, rank))
                linear.register_forward_hook(self.add)

    def add(self, linear, inputs, output):
        """A forward hook: the library's W x becomes W x + B A x."""
        if not self.on:
            return output
        return output + (inputs[0] @ linear.a.T) @ linear.b.T

class Policy:
    """A Qwen2.5-VL or Qwen3-VL model with its tokenizer and image processor.

    `sample` and `log_probs` both read with `extend` and score with `log_softmax`. So the log-probs
    that are trained are those of sampling, but for rounding: `off_policy` in the log watches it.
    """
    def __init__(self, model, tokenizer, processor, cfg):
        self.model, self.tokenizer, self.processor, self.cfg = model, tokenizer, processor, cfg
        self.device = next(model.parameters()).device
        self.image_id = model.config.image_token_id
        self.reference = None  # a frozen copy of the SFT model, for the KL term
        # What is trained: all weights, or adapters alone; with or without the vision tower.
        self.adapters = Adapters(model, cfg.policy.lora) if cfg.policy.lora else None
        frozen = cfg.policy.freeze_vision or cfg.policy.lora > 0
        model.model.visual.requires_grad_(not frozen)
        # Where the tower is frozen, a picture is encoded once. A large model's features are too
        # large to be kept.
        self.keep_features = frozen and not is_large(model)
        # The chat template makes the texts around a turn. There are few of them, and many calls.
        self.prompts = {}
        self.end_id = self.prompt("", "").end_id
        # Only plain tokens and the end of a turn can be sampled. A sampled image placeholder would
        # shift the positions of all that follows; ids beyond the tokenizer's have no text.
        vocabulary = model.get_output_embeddings().weight.shape[0]
        banned = {*special_tokens(tokenizer), self.image_id, *range(len(tokenizer), vocabulary)}
        self.banned = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.banned[sorted(banned - {self.end_id})] = True

    # ---------- texts and ids

    def encode(self, text):
        """Token ids. Tags are encoded apart, since a tokenizer may join '>' with what follows."""
        ids = []
        for piece in TAG.split(text):
            if piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def decode(self, ids):
        """The text of a turn, without the token that ends it."""
        return self.tokenizer.decode([i for i in ids if i != self.end_id])

    def prompt(self, question, reply):
        """What the chat template writes around the policy's turns, as a Prompt of ids.

        question: all before its first turn. end_id: what ends a turn. reply: all between the end
        of a turn and the next turn. An image is one placeholder in it, see `place`.
        """
        if (question, reply) not in self.prompts:
            self.prompts[question, reply] = self.make_prompt(question, reply)
        return self.prompts[question, reply]

    def make_prompt(self, question, reply):
        def text(words):
            check_text(self.tokenizer, f"the text {words[:80]!r}", words)
            return {"type": "text", "text": words}

        def message(role, *content):
            return {"role": role, "content": content}

        def write(messages):
            with cannot_load(self.cfg.model):
                return self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True)

        # One conversation with all that the user can say, MARK being the policy's turn.
        image, system = {"type": "image"}, self.cfg.policy.system
        asked = [message("system", text(system))] if system else []
        asked.append(message("user", text(question), image))
        mark = {"type": "text", "text": MARK}
        said = [message("assistant", mark), message("user", image, text(reply))]
        # Written down, it has to begin as it does when the policy is about to speak.
        before, _, after = write(asked + said).partition(MARK)
        if before != write(asked):
            raise UserError(f"model={self.cfg.model}: its chat template opens a turn otherwise "
                            "than it writes one down, as those of thinking models do")
        # The first token behind the policy's words is the one that ends a turn.
        before, after = self.tokenizer([before, after], add_special_tokens=False)["input_ids"]
        if not before.count(self.image_id) == after.count(self.image_id) == 1:
            raise UserError(f"model={self.cfg.model}: its chat template does not write the model's "
                            f"image token, {self.image_id}, once for a picture, or its tokenizer "
                            "does not know it")
        if after[0] not in special_tokens(self.tokenizer):
            raise UserError(f"model={self.cfg.model}: its chat template ends a turn with "
                            f"{self.tokenizer.decode(after[:1])!r}, which is no special token")
        return Prompt(before, after[0], after[1:])

    def place(self, ids, picture):
        """`ids` with the one image placeholder repeated for each visual token of the picture."""
        at = ids.index(self.image_id)
        return ids[:at] + [self.image_id] * picture.tokens + ids[at + 1 :]

    # ---------- reading

    def encode_pictures(self, pictures):
        """[(visual tokens (down * across, D), their DeepStack features), ...], one a picture."""
        missing = [p for p in dict.fromkeys(pictures) if p.features is None]
        # About 4096 visual tokens go through the vision tower at once.
        largest = max([p.tokens for p in missing], default=1)
        at_once = max(1, 4096 // largest)
        for first in range(0, len(missing), at_once):
            self.look(missing[first : first + at_once])
        found = [p.features for p in pictures]
        if not self.keep_features:
            for picture in missing:
                picture.features = None
        return found

    def look(self, pictures):
        """Let the vision tower make the `features` of these pictures."""
        # Pixels in [0, 1], and then as the tower was trained to take them.
        patches = np.concatenate([p.patches for p in pictures])
        x = torch.from_numpy(patches).to(self.device).float() / 255
        scale = [self.processor.image_mean, self.processor.image_std]
        mean, std = torch.tensor(scale, device=self.device)[:, :, None]
        x = ((x - mean) / std).to(self.model.dtype)
        # A still image is a video of equal frames: (N, 3, frames, patch^2).
        x = torch.stack([x] * self.processor.temporal_patch_size, 2)
        # One call for all pictures. The features come back picture by picture, DeepStack's level by
        # level.
        grids = torch.tensor([p.patch_grid for p in pictures], device=self.device)
        out = self.model.model.get_image_features(x.flatten(1), grids, return_dict=True)
        levels = []  # of DeepStack, each split by picture
        for level in getattr(out, "deepstack_features", None) or ():
            whole = level if torch.is_tensor(level) else torch.cat(level)
            levels.append(whole.split([p.tokens for p in pictures]))
        for number, picture in enumerate(pictures):
            picture.features = out.pooler_output[number], [level[number] for level in levels]

    def read(self, context, texts):
        """Let each conversation read on. texts: for each (ids, never empty, and pictures).

        Returns hidden states (B, 1 + W, D), W being the longest text; short ones are padded. The
        first text of a context has nothing before it: (B, W, D).
        Column j predicts token j, and what stands behind the last token predicts what comes next.
        """
        # Conversations of one row that read different texts part. One text a row is read.
        keys = [(row, tuple(ids)) for row, (ids, _) in zip(context.rows, texts)]
        shown = {key: pictures for key, (_, pictures) in zip(keys, texts)}
        keys = context.group(keys)
        # Short texts are padded with -1, which is no token.
        ids = [torch.tensor(ids, device=self.device) for _, ids in keys]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        pictures = [picture for key in keys for picture in shown[key]]
        before = context.last
        hidden = self.extend(context, ids.clamp(min=0), ids >= 0, pictures)
        if before is None:
            return hidden
        return torch.cat([before[:, None], hidden], 1)

    def extend(self, context, ids, new, pictures=()):
        """Let the model read `ids` (B, W) where `new` (B, W) is True, after what `context` holds.

        In a row of `new` True comes first, then False. pictures: those of row 0, of row 1, ...
        The context grows. Returns the hidden states (B, W, D).
        """
        # What the model reads, where it stands, and what each new token may see.
        embeds, deepstack = self.embed(ids, new, pictures)
        positions = self.positions_of(ids, new, pictures) + context.position[:, None]
        mask = context.add_columns(new)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True,
            **{CACHE: context.cache}, **deepstack).last_hidden_state
        context.advance(new, positions, hidden)
        return hidden

    def embed(self, ids, new, pictures):
        """Embeddings (B, W, D), with pictures in their places; and DeepStack's arguments."""
        # Text first. Where there are pictures, their visual tokens take the places of placeholders.
        embeds = self.model.get_input_embeddings()(ids)
        if not pictures:
            return embeds, {}
        seen = ids.eq(self.image_id) & new
        visual, deep = zip(*self.encode_pictures(pictures))
        visual = torch.cat(visual).to(embeds.dtype)
        embeds = embeds.masked_scatter(seen[..., None], visual)
        if not deep[0]:
            return embeds, {}
        # Qwen3-VL adds deeper visual features to its first layers.
        levels = [torch.cat(level) for level in zip(*deep)]
        return embeds, {"visual_pos_masks": seen, "deepstack_visual_embeds": levels}

    def positions_of(self, ids, new, pictures):
        """M-RoPE positions (3, B, W), counted from the first new token of a row.

        A text token takes one step on all three axes. An image's tokens keep the time axis and
        spread over rows and columns; the text after it goes on from the larger side.
        """
        # Text alone takes a step a token.
        if not pictures:
            return (new.long().cumsum(1) - 1).expand(3, *ids.shape)
        # With pictures the library knows where each visual token stands.
        is_image = ids.eq(self.image_id) & new
        grids = torch.tensor([p.patch_grid for p in pictures])
        positions, _ = self.model.model.get_rope_index(
            ids.cpu(), mm_token_type_ids=is_image.int().cpu(), attention_mask=new.cpu(),
            image_grid_thw=grids)
        return positions.to(self.device)

    def open(self, episodes):
        """A Context that holds the opening of each episode. That of a start is read once."""
        openings = {e.group_id: e.opening for e in episodes}
        context = Context(len(openings), self.device)
        self.read(context, list(openings.values()))
        # All episodes of a start go on from its row.
        starts = list(openings)
        context.take([starts.index(e.group_id) for e in episodes])
        return context

    # ---------- sampling and scoring

    def log_softmax(self, hidden):
        """Log-probs (..., V) of the next token at the sampling temperature, banned ones -inf."""
        # In fp32, since log-probs of rare tokens need its digits.
        logits = self.model.get_output_embeddings()(hidden).float() / self.cfg.policy.temperature
        return logits.masked_fill(self.banned, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def sample(self, context, luck=None):
        """One turn for each conversation: a list of (ids, log-probs).

        luck: (conversations, policy.max_new) numbers in [0, 1) that decide the tokens, so that none
        depends on its neighbours; None: greedy. UserError if the first log-probs are not finite.
        """
        # Token by token, until the last conversation has ended. -1 stands where others have before.
        tokens, logps = [], []
        done = torch.zeros(len(context.rows), dtype=torch.bool, device=self.device)
        for place in range(self.cfg.policy.max_new):
            logp = self.log_softmax(context.last)[context.rows]
            token = logp.argmax(-1) if luck is None else pick(logp, luck[:, place])
            tokens.append(torch.where(done, -1, token))
            logps.append(logp.gather(1, token[:, None])[:, 0])

            # Conversations of one row that say different tokens part. The end token is read too.
            keys = context.group(list(zip(context.rows, tokens[-1].tolist())))
            said = torch.tensor([token for _, token in keys], device=self.device)[:, None]
            self.extend(context, said.clamp(min=0), said >= 0)
            done = done | (token == self.end_id)
            if done.all():
                break
        if not torch.isfinite(logps[0]).all():
            raise UserError("the policy's log-probs are not finite: lower the learning rate")
        # The turns, without what stands behind their ends.
        tokens, logps = torch.stack(tokens, 1), torch.stack(logps, 1)
        lengths = (tokens >= 0).sum(1).tolist()
        rows = zip(lengths, tokens.tolist(), logps.tolist())
        return [(ids[:length], logp[:length]) for length, ids, logp in rows]

    def log_probs(self, episodes):
        """Log-probs, with gradients, and entropies of the episodes' `actions`: two lists of
        (tokens,) tensors, one an episode. Equal episodes get the same tensors."""
        context = self.open(episodes)
        hidden = self.read(context, [e.rest for e in episodes])
        # Equal episodes are one row, and the gradient of a row is the sum of theirs.
        distinct = dict(zip(context.rows, episodes))
        # The places that the loss looks at, and the tokens that were said there.
        places = [(row, column) for row, e in distinct.items() for column, _ in e.actions]
        taken = [distinct[row].rest[0][column] for row, column in places]
        taken = torch.tensor(taken, device=self.device)
        rows, columns = torch.tensor(places, device=self.device).T
        wanted = hidden[rows, columns]

        # Logits only where the loss looks, 256 tokens at a time, and computed again in the
        # backward pass: with a real vocabulary they take 0.6 MB a token.
        parts = zip(wanted.split(256), taken.split(256))
        scored = [recompute(self.score, *part) for part in parts]
        counts = [len(e.actions) for e in distinct.values()]
        logps, entropies = [torch.cat(values).split(counts) for values in zip(*scored)]
        return [logps[row] for row in context.rows], [entropies[row] for row in context.rows]

    def score(self, hidden, taken):
        """Log-probs of the tokens taken (N,) and entropies (N,), from hidden states (N, D)."""
        logp = self.log_softmax(hidden)
        with torch.no_grad():  # a figure for the log
            entropy = -(logp.exp() * logp.masked_fill(self.banned, 0)).sum(-1)
        return logp.gather(1, taken[:, None])[:, 0], entropy

    @torch.no_grad()
    def reference_log_probs(self, episodes):
        """Those of the SFT model: of `reference`, or with adapters of this model without them."""
        if self.adapters is None:
            return self.reference.log_probs(episodes)[0]
        with self.without_adapters():
            return self.log_probs(episodes)[0]

    @contextlib.contextmanager
    def without_adapters(self):
        """Inside of this the model is the one that it was before it got adapters."""
        self.adapters.on = False
        try:
            yield
        finally:
            self.adapters.on = True

    def save(self, folder):
        """Write a Hugging Face folder, whole or not at all; adapters are merged into it."""
        # With adapters the folder holds W + B A, so that it is a plain model.
        state = self.model.state_dict()
        for a in [name for name in state if name.endswith(".a")]:
            linear = a.removesuffix(".a")
            change = state.pop(f"{linear}.b") @ state.pop(a)
            state[f"{linear}.weight"] = state[f"{linear}.weight"] + change
        with written_whole(folder) as temporary:
            self.model.save_pretrained(temporary, state_dict=state)
            self.tokenizer.save_pretrained(temporary)
            self.processor.save_pretrained(temporary)

def pick(logp, luck):
    """The first token (B,) at which the summed probability passes a number of luck (B,)."""
    # Rounding may leave the sum a little below 1, so the number is scaled with it.
    total = logp.to(luck.dtype).exp().cumsum(-1)
    token = torch.searchsorted(total, luck[:, None] * total[:, -1:], right=True)
    return token[:, 0].clamp(max=logp.shape[-1] - 1)

def uniforms(policy, names, samples, turns):
    """Numbers in [0, 1) that decide what is sampled: (len(names) * samples, turns, policy.max_new).
    They depend on the names alone, such as "seed step number": not on workers, nor on stops."""
    size = (len(names), samples, turns, policy.cfg.policy.max_new)
    numbers = torch.empty(size, dtype=torch.float64)
    for of_name, name in zip(numbers, names):
        # A generator of its own for each name, so that no name disturbs another.
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
        of_name.uniform_(generator=torch.Generator().manual_seed(seed))
    return numbers.flatten(0, 1).to(policy.device)

# ---------- loading a model

def source_of(name):
    """What `model=` names: a folder, as it stands or beside this file, of a model or of a run; or a
    hub name."""
    # As the user sees it, or beside this file.
    folder = Path(name) if Path(name).is_dir() else HERE / name
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model={name} holds adapters alone: merge them into their base first")
    for place in (folder, folder / "model"):  # a run keeps its model in there
        if (place / "config.json").is_file():
            return str(place)
    if folder.exists() or not re.fullmatch(r"(?!assets/|runs/)[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"model={name}: no folder with a config.json; name a Hugging Face folder")
    return name

@contextlib.contextmanager
def cannot_load(source):
    """What goes wrong inside of this becomes one line that names the model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # half a download, another architecture: many kinds
        line = str(error) or repr(error)
        raise UserError(f"model={source} cannot be loaded: {line}") from None

@functools.lru_cache
def load_parts(source, max_pixels):
    """(tokenizer, image processor). The processor's class needs no torchvision. max_pixels: see
    policy.max_pixels; a model that is saved keeps it."""
    # The library would make up a tokenizer without words.
    files = [file.name for file in Path(source).glob("*")]
    if files and not {"tokenizer.json", "vocab.json"} & {*files}:
        raise UserError(f"model={source} has no tokenizer.json: copy it there")
    with cannot_load(source):
        config = transformers.AutoConfig.from_pretrained(source).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        tokenizer.model_max_length = config.max_position_embeddings
        if "image" not in str(tokenizer.chat_template):  # some releases keep it for the processor
            file = transformers.utils.cached_file(source, "chat_template.json")
            tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]
        processor = qwen_images.Qwen2VLImageProcessorPil.from_pretrained(source)
        if max_pixels:
            processor.size["longest_edge"] = max_pixels
        return tokenizer, processor

def special_tokens(tokenizer):
    """{id: text} of the tokens that are no text: ends of turns, pictures. Not all of them are in
    the tokenizer's own list."""
    tokens = tokenizer.added_tokens_decoder.items()
    special = {number: str(token) for number, token in tokens if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))

def check_text(tokenizer, name, text):
    """UserError if the model cannot read a text as it is meant."""
    # Such a token in a text would start or end a turn, or stand for a picture.
    for token in [*special_tokens(tokenizer).values(), MARK]:
        if token in text:
            raise UserError(f"{name} holds {token!r}, which means something else to the model")
    # Words that the tokenizer lacks would all look the same.
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id in ids:
        raise UserError(f"{name}: the model's tokenizer does not have all words of {text!r}")
    if len(ids) >= tokenizer.model_max_length:
        raise UserError(f"{name} has {len(ids)} tokens; the model can read "
                        f"{tokenizer.model_max_length} in all")

def check_parts(name, model, tokenizer, processor, missing):
    """UserError if the parts of a model would give nonsense together: the library would make up
    what is missing. missing: names of tensors that the files lack."""
    # Each part alone may be in order; here they have to fit each other.
    vision, rows = model.config.vision_config, len(model.get_input_embeddings().weight)
    sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    other = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    broken = [n for n, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    for fault, text in (
            ({*kinds} - {"full_attention"}, f"it has layers of other than full attention: {kinds}"),
            (missing, f"its files lack {len(missing)} tensors, such as {missing[:1]}"),
            (sizes != other, f"patch, merge and frames are {sizes} in the model, {other} in its "
                             "image processor"),
            (len(tokenizer) > rows,
             f"its tokenizer has {len(tokenizer)} words, its embedding {rows}"),
            (broken, f"its weight {broken[:1]} is not finite")):
        if fault:
            raise UserError(f"model={name}: {text}")

def device_of(cfg):
    """The device of this worker. UserError if it is not there."""
    # Worker n of this machine takes GPU n.
    number = int(os.environ.get("LOCAL_RANK", 0))
    there = torch.cuda.device_count()
    if cfg.device == "cpu" or cfg.device == "auto" and not there:
        return torch.device("cpu")
    if number < there:
        return torch.device("cuda", number)
    raise UserError(f"torch sees {there} GPUs, and worker {number} (from 0) needs one: lower "
                    "--nproc-per-node, or give device=cpu")

def load_policy(name, cfg):
    """A Policy from a Hugging Face folder or hub name, on cfg.device. UserError if it fails."""
    source, device = source_of(name), device_of(cfg)
    dtype = cfg.policy.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    # The library would load other families as well, and this program would read them wrongly.
    with cannot_load(source):
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind not in ("qwen3_vl", "qwen2_5_vl"):
            raise ValueError(f"it is a {kind}, and this program knows qwen3_vl and qwen2_5_vl")
        model, about = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    tokenizer, processor = load_parts(source, cfg.policy.max_pixels)
    check_parts(name, model, tokenizer, processor, sorted(about["missing_keys"]))
    if not is_large(model):
        # It has too little work for two threads: while they wait for each other they spin, and
        # beside other work on the machine a step would take minutes.
        torch.set_num_threads(1)
    else:
        for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
            change_class(layer, Checkpointed)
    # The patch embedding is faster as what it is, and attention without cuDNN, which would plan
    # anew at each new length.
    change_class(model.model.visual.patch_embed.proj, LinearPatches)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return Policy(model.to(device).eval(), tokenizer, processor, cfg)

def is_large(model):
    """Whether memory matters more than time: layers and pictures are then computed again."""
    return sum(p.numel() for p in model.parameters()) > 100_000_000

def change_class(module, mixin):
    """Let `mixin` come before the class of this one module. A forward that is stored in the module
    would refer back to it, and then nothing but a garbage collection would free its weights."""
    # The class is changed for this module alone.
    kind = type(module)
    module.__class__ = type(kind.__name__, (mixin, kind), {})

class LinearPatches:
    """The patch embedding as the linear map that it is, since its stride is its kernel. On a GPU
    this is twice as fast."""
    def forward(self, patches):
        return torch.nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)

class Checkpointed:
    """Gradient checkpointing of a layer: only its input is kept for the backward pass.

    The library's own switch takes away the cache, which holds the opening that episodes share.
    Here the layer gets a cache of its own, so that computing it twice has no side effect. What is
    new in it joins the real one afterwards.
    """
    def forward(self, hidden, **rest):
        # The layer as the library wrote it.
        layer = super().forward
        cache = rest.pop(CACHE, None)
        if cache is None:  # the vision tower has none
            return recompute(functools.partial(layer, **rest), hidden)
        if not torch.is_grad_enabled():
            return layer(hidden, **rest, **{CACHE: cache})
        # What the cache holds of this layer goes in as tensors, and what is new comes out as such.
        number = self.self_attn.layer_idx
        past = cache.get_seq_length(number)

        def run(hidden, *old):
            own = transformers.DynamicCache()
            if old:
                own.update(*old, number)
            hidden = layer(hidden, **rest, **{CACHE: own})
            keys, values = own.layers[number].keys, own.layers[number].values
            return hidden, keys[:, :, past:], values[:, :, past:]

        old = []
        if past:
            old = [cache.layers[number].keys, cache.layers[number].values]
        # Now the real cache gets what is new.
        hidden, keys, values = recompute(run, hidden, *old)
        cache.update(keys, values, number)
        return hidden

# ==================== 8. Tasks ====================================================================
# A task knows its pictures, what is asked about them, and which answers are correct. All that the
# method needs of it is in the list below.
class Task:
    """What the model learns. A new task is a subclass, an entry in TASKS and a row in config.yaml.

    An *example* is a dict with id, image (a path), size (width, height) and what the rules need.
    An *answer* is a tuple, which `parse` makes of the text inside <ANSWER>. Write
        __init__(cfg)               super().__init__(cfg, plan, make), as Grounding does
        question(example)           (text before the picture, text after each feedback picture)
        parse(text, last=None)      answer, or None; last: the answer that this one revises
        exact(example, answer)      whether it is correct
        progress(example, answer)   p in [0, 1], which the reflection reward credits
        feedback(example, answer)   PIL image of what the answer does
    and, for demonstrations,
        solution(example, rng)      a correct answer
        mistake(example, rng)       another answer, most often a wrong one
        thought(example, answer)    the words for what the feedback to a wrong answer shows
    `check`, `same` (a repetition earns nothing), `say` and `axes` may be written anew."""
    splits = ("id",)
    empty_final = False  # whether demonstrations commit with <FINAL></FINAL>

    def __init__(self, cfg, plan, make):
        """Make the data of make.draw, once. plan: a dict of lists: "test_X" and "dev_X" of each
        split X ("id" first), then "train". For an item (7, "snow"), make(rng, 7, "snow") in
        data_prep.py gives (record, PIL image). The record, with id, image and size added, is an
        example."""
        # Other plans, and other code that makes the pictures, get a folder of their own.
        if Path(cfg.data).is_file():
            raise UserError(f"data={cfg.data} is a file: it needs task=points")
        code = data_prep.code_digest(HERE / "data_prep.py")
        self.cfg = cfg
        name = data_prep.digest_of([plan, code, cfg.make.draw])
        self.folder = Path(cfg.data) / f"{cfg.task}-{name}"
        self.splits = [part.removeprefix("test_") for part in plan if part.startswith("test_")]
        data_prep.make_folder(self.folder, cfg.task, plan, make, cfg.make.draw)

    def examples(self, split):
        """The examples of "train", or of "dev_X" or "test_X" of a split X."""
        return data_prep.read_examples(self.folder / f"{split}.jsonl", self.check)

    def check(self, example):
        """UserError unless the record of a data file can be used."""

    def image(self, example):
        """The picture of a question, a PIL image. Do not paint on it."""
        return data_prep.cached_image(self.folder / example["image"])

    def same(self, answer, other):
        """Whether the second answer only repeats the first."""
        return answer == other

    def axes(self, example, before, after):
        """(bool, bool) for the log: of a revision, whether it is exact along x and y; or None."""

    def say(self, answer, last=None):
        """The text that states an answer, so that `parse` reads it."""
        return " ".join(str(part) for part in answer)

    def demonstrations(self):
        """SFT traces: a list of (example, turns). A turn is (taught, context): its text in two
        parts, of which the first enters the loss. Wrong answers are context, never taught.
        In this one the target is at 1 1, and 2 2 is wrong too:
            taught                                                     context
                                                                       <ANSWER>2 3</ANSWER>
            <THINK>left 1 up 2</THINK>                                 <ANSWER>up 1</ANSWER>
            <THINK>left 1 up 1</THINK><ANSWER>left 1 up 1</ANSWER>
            <FINAL></FINAL>
        A share sft.multi_share 0.5 has 1 to 4 wrong answers; the others are right at once."""
        rng = random.Random(f"demonstrations {self.cfg.make.draw}")
        found = []
        for example in self.examples("train")[: self.cfg.make.traces]:
            solution, wanted = self.solution(example, rng), 0
            if rng.random() < self.cfg.sft.multi_share:
                wanted, = rng.choices((1, 2, 3, 4), weights=(4, 3, 2, 1))
            mistakes = self.mistakes(example, solution, wanted, rng)
            found.append((example, self.trace(example, [*mistakes, solution])))
        return found

    def mistakes(self, example, solution, wanted, rng):
        """`wanted` different wrong answers; fewer where the box leaves no room for them."""
        # Newer ones stand before older ones, and the solution stands last.
        answers = [solution]
        for _ in range(100 * wanted):
            new = self.mistake(example, rng)
            if not self.exact(example, new) and not any(self.same(new, a) for a in answers):
                answers.insert(0, new)
            if len(answers) > wanted:
                break
        return answers[:-1]

    def trace(self, example, answers):
        """The turns of one demonstration, of which the last answer is correct."""
        turns, think, last = [], "", None
        for answer in answers:
            if turns:
                think = f"<THINK>{self.thought(example, last)}</THINK>"
            turns.append([think, f"<ANSWER>{self.say(answer, last)}</ANSWER>"])
            last = answer
        # The last answer is correct, so all of it is taught.
        turns[-1] = ["".join(turns[-1]), ""]
        final = "" if self.empty_final else self.say(last)
        return [*turns, [f"<FINAL>{final}</FINAL>", ""]]

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
        """The question stands in the text that the settings put around it."""
        points = self.cfg.points
        return points.question.replace("{question}", example["question"]), points.reply

    def parse(self, text, last=None):
        """'3 14', '3, 14' and '(3, 14)' are (3, 14); as a move from `last`, see `parse_move`."""
        text = text.strip()
        if last and self.cfg.points.moves:
            answer = self.parse_move(text, last)
        else:
            found = re.fullmatch(r"\(?\s*(\d{1,5})(?:\s*,\s*|\s+)(\d{1,5})\s*\)?", text, re.ASCII)
            answer = found and (int(found[1]), int(found[2]))
        most = self.cfg.points.scale or 10_000
        # Outside of the picture there is nothing to point at.
        inside = answer and min(answer) >= 0 and max(answer) <= most
        return answer if inside else None

    def parse_move(self, text, last):
        """'left 3 up 1' from (6, 15) is (3, 14). None where anything else is said."""
        # Moves alone, with nothing between them.
        moves = re.findall(r"(left|right|up|down) (\d{1,5})", text, re.ASCII)
        if not moves or " ".join(f"{side} {units}" for side, units in moves) != text:
            return None
        # From the last point, move by move.
        x, y = last
        for side, units in moves:
            down, right = data_prep.MOVES[side]
            x, y = x + right * int(units), y + down * int(units)
        return x, y

    def say(self, answer, last=None):
        """A first answer is a point, and a revised one may be a move."""
        if last and self.cfg.points.moves:
            return self.move(last, answer)
        return super().say(answer)

    def move(self, here, there):
        """The way from a point to another: "left 3 up 1"."""
        # Nothing is said of an axis along which there is nothing to do.
        across, down = there[0] - here[0], there[1] - here[1]
        words = []
        if across:
            words.append(f"{'left' if across < 0 else 'right'} {abs(across)}")
        if down:
            words.append(f"{'up' if down < 0 else 'down'} {abs(down)}")
        return " ".join(words)

    def ends(self, example):
        """The coordinates of the right and the lower edge."""
        # A scale of its own, as Qwen3-VL has it, or pixels as Qwen2.5-VL has them.
        scale = self.cfg.points.scale
        if scale:
            return scale, scale
        _, processor = load_parts(source_of(self.cfg.model), self.cfg.policy.max_pixels)
        return size_seen(example["size"], processor)

    def pixel(self, example, answer):
        """An answer as (x, y) in pixels of the image."""
        (width, height), (x_end, y_end) = example["size"], self.ends(example)
        return answer[0] * width / x_end, answer[1] * height / y_end

    def centre(self, example):
        """The middle of the target's box, in pixels."""
        x0, y0, x1, y1 = example["box"]
        return (x0 + x1) / 2, (y0 + y1) / 2

    def distance(self, example, answer):
        """From the point to the target's centre, in pixels."""
        return math.dist(self.pixel(example, answer), self.centre(example))

    def exact(self, example, answer):
        """Inside the box, or at most `within` pixels from its centre where the example has it."""
        if example["within"]:
            return self.distance(example, answer) <= example["within"]
        # Half open: a point on the right or the lower edge is outside.
        x, y = self.pixel(example, answer)
        x0, y0, x1, y1 = example["box"]
        return x0 <= x < x1 and y0 <= y < y1

    def progress(self, example, answer):
        """p = phi(d) = (exp(-d^2 / s1^2) + exp(-d^2 / s2^2)) / 2, d: `distance`, s2: the side of
        the crop, s1 = 0.4 s2 (paper: s2 = 200, s1 = 80)."""
        # Near the target the narrow bell rises, from afar the wide one.
        d, s2 = self.distance(example, answer), self.cfg.points.crop
        near = math.exp(-((d / (0.4 * s2)) ** 2))
        far = math.exp(-((d / s2) ** 2))
        return (near + far) / 2

    def same(self, answer, other):
        """Nearer than 1/100 of the scale (10 pixels at scale 0): a jitter is no new answer."""
        return math.dist(answer, other) < (self.cfg.points.scale or 1000) / 100

    def feedback(self, example, answer):
        """A crop centred on the point, grey beyond the edge of the picture."""
        point = self.pixel(example, answer)
        return data_prep.draw_crop(self.image(example), point, self.cfg.points.crop)

    def solution(self, example, rng=None):
        """The point of the scale nearest to the target's centre. UserError if it is not correct."""
        # The nearest point on each axis; halves go down.
        sides = zip(self.centre(example), example["size"], self.ends(example))
        answer = tuple(math.ceil(middle * end / side - 0.5) for middle, side, end in sides)
        if self.exact(example, answer):
            return answer
        raise UserError(f"{example['image']}: no point of the scale is correct for box "
                        f"{example['box']}, within {example['within']} (0: inside): enlarge it, or "
                        "raise points.scale as far as the model's numbers go")

    def mistake(self, example, rng):
        """Half of these lie within a crop of the target, the others anywhere."""
        # Near ones are seen in the crop. Far ones teach what to do when nothing is to be seen.
        reach = self.cfg.points.crop / 2
        near = rng.random() < 0.5
        answer = []
        for middle, side, end in zip(self.centre(example), example["size"], self.ends(example)):
            low, high = (middle - reach, middle + reach) if near else (0, side)
            share = rng.uniform(low, high) / side
            answer.append(round(min(max(share, 0), 1) * end))
        return tuple(answer)

    def thought(self, example, answer):
        """The move that leads to the target; "far" if the crop does not show it, "here" on it."""
        (x, y), (target_x, target_y) = self.pixel(example, answer), self.centre(example)
        if max(abs(x - target_x), abs(y - target_y)) >= self.cfg.points.crop / 2:
            return "far"
        return self.move(answer, self.solution(example)) or "here"

    def axes(self, example, before, after):
        """(x, y): whether a revision meets the middle of the box along each axis, to one unit; None
        where the feedback did not show the target. For the log."""
        if self.exact(example, before) or self.thought(example, before) == "far":
            return None
        return [abs(said - wanted) <= 1 for said, wanted in zip(after, self.solution(example))]

class OwnPoints(Points):
    """One's own data: `task=points data=FILE`, a JSONL file of {"image", "question", "box"}. A line
    with "split": "night" is in test_night, out of distribution; there is no dev_night."""
    def __init__(self, cfg):
        tokenizer, _ = load_parts(source_of(cfg.model), cfg.policy.max_pixels)
        self.cfg, self.folder = cfg, Path(cfg.data).parent
        check = functools.partial(check_text, tokenizer)
        self.own = data_prep.own_examples(cfg.data, check, quiet=RANK > 0)
        # The rows of the table.
        wanted, found = f"{cfg.eval.splits}_", [part for part in self.own if self.own[part]]
        self.splits = [part.removeprefix(wanted) for part in found if part.startswith(wanted)]
        if not self.splits or "train" not in found and cfg.mode == "train":
            raise UserError(f"{cfg.data}: too few pictures for train or for {cfg.eval.splits}: add "
                            'some, or give some lines that "split"')

    def examples(self, split):
        """One's own examples of this part."""
        return self.own[split]

class Grounding(Points):
    """The paper's grounding experiment: trained on small tables alone; out of distribution are
    large tables, bar charts, scatter plots, and with points.kind=text inner cells of tables."""
    def __init__(self, cfg):
        make = cfg.make
        plan = data_prep.figure_plan(cfg.points.kind, make.train, make.test, make.draw)
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
            make = cfg.make
            plan = data_prep.navigation_plan(make.train, make.test, cfg.nav.cell, make.draw)
            super().__init__(cfg, plan, data_prep.make_map)

    check = staticmethod(data_prep.check_map)

    def question(self, example):
        """All maps have the same question."""
        return self.cfg.nav.question, self.cfg.nav.reply

    def parse(self, text, last=None):
        """'up, left' -> ("up", "left")."""
        # Commas are taken for spaces, and nothing but moves may be said.
        moves = tuple(text.lower().replace(",", " ").split())
        known = all(move in data_prep.MOVES for move in moves)
        return moves if moves and known else None

    def walk(self, example, answer):
        """(distances to the goal at the start and after each move, what ended the walk): "edge" or
        "hole" end it before the move that leads there, else ""."""
        # The walk begins on the elf, and each move has to stay on ice.
        layout = example["layout"]
        distance = data_prep.shortest_distances(layout)
        row, column = data_prep.find_cell(layout, "S")
        remaining = [int(distance[row, column])]
        for move in answer:
            down, right = data_prep.MOVES[move]
            row, column = row + down, column + right
            if not (0 <= row < len(layout) and 0 <= column < len(layout[0])):
                return remaining, "edge"
            if layout[row][column] == "H":
                return remaining, "hole"
            remaining.append(int(distance[row, column]))
        return remaining, ""

    def exact(self, example, answer):
        """The way ends on the goal, and none is shorter."""
        # A way that is cut off, or stops short, or takes a detour, is wrong.
        remaining, failure = self.walk(example, answer)
        return not failure and remaining[-1] == 0 and len(answer) == remaining[0]

    def thought(self, example, answer):
        """What is wrong with a way: "edge" or "hole", whichever comes first; else "short" (it never
        meets the goal), "past" (it goes on behind it) or "longer" (a shorter way exists)."""
        remaining, failure = self.walk(example, answer)
        if failure:
            return failure
        if 0 not in remaining:
            return "short"
        return "longer" if remaining.index(0) == len(answer) else "past"

    def progress(self, example, answer):
        """p: how many leading moves each come one nearer to the goal, over the shortest length. A
        way that runs on past the goal is wrong: it gets 0, where this count would give 1."""
        # Count moves until the first that does not come nearer.
        remaining, _ = self.walk(example, answer)
        length = remaining[0]
        good = 0
        for distance in remaining[1:]:
            if distance != length - good - 1:
                break
            good += 1
        if good == length and good < len(answer):
            return 0.0
        return good / length

    def feedback(self, example, answer):
        """The map with the way painted on it."""
        layout = example["layout"]
        return data_prep.draw_path(
            self.image(example), (len(layout), len(layout[0])), data_prep.find_cell(layout, "S"),
            answer, example["look"], example.get("box"))

    def solution(self, example, rng):
        """One of the shortest ways, by chance."""
        return tuple(data_prep.shortest_path(example["layout"], rng))

    def mistake(self, example, rng):
        """A wrong way, most often one that runs straight to the goal."""
        path, exact = list(self.solution(example, rng)), functools.partial(self.exact, example)
        return tuple(data_prep.wrong_path(example["layout"], path, exact, rng))

TASKS = {"grounding": Grounding, "points": OwnPoints, "navigation": Navigation}

# ==================== 9. Optimizer and SFT ========================================================
# AdamW is written out for one reason: updates in bf16. SFT comes before RL, and shows the model the
# form of an episode.
class AdamW:
    """AdamW (betas 0.9, 0.95; decay 0), for bf16 weights with Kahan's sum.

    A bf16 number has 8 significant bits: an update below 1/256 of a weight may be rounded away.
    What rounding takes is kept in `lost` and added to the next update. The gradient's norm is
    clipped to 1. A step whose norm is not finite changes nothing."""
    def __init__(self, policy):
        self.weights = [p for p in policy.model.parameters() if p.requires_grad]
        # What is kept of each weight, beside the weight itself.
        names = ["mean", "square"]
        if self.weights[0].dtype == torch.bfloat16:
            names.append("lost")
        self.kept = {name: [torch.zeros_like(p) for p in self.weights] for name in names}
        self.steps = torch.tensor(0)

    def state(self):
        """{name: tensor}, weights too: all that a checkpoint needs of model and optimizer."""
        # Names that a checkpoint can be read by.
        state = {"steps": self.steps}
        for name, tensors in {"weight": self.weights, **self.kept}.items():
            for number, tensor in enumerate(tensors):
                state[f"{name}.{number}"] = tensor.detach()
        return state

    @torch.no_grad()
    def step(self, lr):
        """One update from all workers' gradients (section 12). Clears them; returns their norm."""
        for weight in self.weights:
            if weight.grad is None:  # a worker that had nothing to learn
                weight.grad = torch.zeros_like(weight)
            if WORKERS > 1:  # a sum, since every loss is divided by the count of the whole batch
                dist.all_reduce(weight.grad)
        # The norm of the whole gradient, before it is cut to 1.
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0).item()
        if math.isfinite(norm):
            self.steps += 1
            for weight, *kept in zip(self.weights, *self.kept.values()):
                self.update(weight, lr, *kept)
        for weight in self.weights:
            weight.grad = None
        return norm

    def update(self, weight, lr, mean, square, lost=None):
        """Adam's update of one weight, in place."""
        grad = weight.grad.float()
        # The two moving means, in fp32 whatever the weights are.
        mean.copy_(mean.float().lerp(grad, 1 - 0.9))
        square.copy_(square.float().lerp(grad * grad, 1 - 0.95))
        # At first they are too small, since they began at 0.
        mean_bias = 1 - 0.9 ** self.steps.item()
        square_bias = 1 - 0.95 ** self.steps.item()
        scale = (square.float() / square_bias).sqrt() + 1e-8
        change = -lr / mean_bias * mean.float() / scale
        if lost is None:
            weight.add_(change)
            return
        # Kahan's sum: add what was lost before, and keep what is lost now.
        old = weight.float()
        change += lost.float()
        weight.copy_(old + change)
        lost.copy_(change - (weight.float() - old))

def batch_of(items, count, step, seed):
    """Step 1, 2, ... takes the next `count` of endless passes over items, each shuffled by seed."""
    # Which pass this step begins in, and where in it.
    number, skip = divmod((step - 1) * count, len(items))
    taken = []
    while len(taken) < skip + count:
        taken += random.Random(f"{seed} {number}").sample(items, len(items))
        number += 1
    return taken[skip : skip + count]

def micro_batches(episodes, size):
    """Slices of at most `size` different episodes; equal ones stand together, since they share a
    row. Equal lengths stand together too, for little padding; within a length one start does, since
    its opening is then read once."""
    # A short text beside a long one would be padding for the most part.
    def length_and_start(episode):
        return len(episode.rest[0]), episode.group_id

    equal = {}
    for episode in sorted(episodes, key=length_and_start):
        key = episode.group_id, tuple(episode.rest[0])
        equal.setdefault(key, []).append(episode)
    groups = list(equal.values())
    slices = [groups[first : first + size] for first in range(0, len(groups), size)]
    return [list(itertools.chain(*part)) for part in slices]

def demonstration(policy, task, example, turns, start):
    """A demonstration as an Episode. turns: [(taught, context), ...], see Task.demonstrations."""
    episode = begin(policy, task, example, start)
    for number, (taught, context) in enumerate(turns, 1):
        # Its ids are what the policy would have sampled to say this.
        ids = policy.encode(taught + context) + [policy.end_id]
        turn = read_turn(policy, task, episode, ids)
        if context:  # a wrong answer; the end of its turn is not taught either
            count = len(policy.encode(taught))
            turn.loss_tokens = [place < count for place in range(len(ids))]
        episode.turns.append(turn)
        if number < len(turns):
            reply(policy, task, episode, turn)
    return episode

def sft(policy, task, cfg, run):
    """Supervised fine-tuning in two stages: `first` teaches first answers on all training pictures,
    `sft` whole demonstrations, make.traces 128 of them."""
    rng = random.Random(f"first answers {cfg.make.draw}")
    # First answers of all training pictures.
    singles = []
    for example in task.examples("train"):
        text = f"<ANSWER>{task.say(task.solution(example, rng))}</ANSWER>"
        singles.append((example, [(text, "")]))
    # Whole episodes, with corrections in some of them.
    traces = task.demonstrations()
    check_turns(policy, singles + traces)
    sft_stage("first", cfg.sft.first_steps, singles, policy, task, cfg, run)
    sft_stage("sft", cfg.sft.steps, traces, policy, task, cfg, run)

def check_turns(policy, data):
    """UserError if the policy could not say all that it is to be taught."""
    texts = {taught + context for _, turns in data for taught, context in turns}
    most = policy.cfg.policy.max_new
    for text in sorted(texts):
        ids = policy.encode(text)
        if policy.tokenizer.unk_token_id in ids:
            raise UserError(f"the model's tokenizer does not have all words of {text!r}")
        if len(ids) >= most:
            raise UserError(f"policy.max_new={most} is too small: {text!r} and its end take "
                            f"{len(ids) + 1} tokens")

KEPT = 700_000_000  # pixels of demonstrations that are kept: 2 GB

def sft_stage(stage, steps, data, policy, task, cfg, run):
    """Minimise the mean of -log pi(taught token), at policy.temperature."""
    optimizer = AdamW(policy)

    def make(number):
        return demonstration(policy, task, *data[number], number)

    # Each is made once, or again each time where all together would take much memory.
    pixels = sum(math.prod(example["size"]) for example, _ in data)
    if pixels < KEPT:
        make = functools.cache(make)
    for step in run.steps(stage, steps, optimizer):
        # The demonstrations of this step.
        numbers = share(batch_of(range(len(data)), cfg.sft.batch, step, cfg.seed))
        batch = [make(number) for number in numbers]
        # The mean over the taught tokens of all workers.
        tokens = sum(gather([len(episode.actions) for episode in batch]))
        total = 0.0
        # The gradient, a micro-batch at a time, for memory.
        for part in micro_batches(batch, cfg.policy.micro):
            logps, _ = policy.log_probs(part)
            loss = -torch.cat(logps).sum() / tokens
            loss.backward()
            total += loss.item()
        # The rate rises for a tenth of the steps, and falls to a tenth along a cosine.
        warm = min(1.0, step / max(1, min(100, steps // 10)))
        rate = cfg.sft.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        norm = optimizer.step(rate)
        run.log(loss=sum(gather([total])), grad_norm=norm, lr=rate)

# ==================== 10. Evaluation ==============================================================
# What an episode came to, what is logged of a step, and greedy play on the test splits with probes.
def outcome(task, episode):
    """What an episode came to, for JSON. correct: of each answer, given ones too; never empty.
    next: whether the answer after the first is correct. axes: see Task.axes, of each revision."""
    turns, answers = episode.all_turns, episode.answers
    last = turns[-1]
    pairs = itertools.pairwise(answers[max(0, len(episode.given) - 1) :])
    axes = [task.axes(episode.example, before, after) for before, after in pairs]
    # An episode without any answer counts as wrong.
    correct = [bool(task.exact(episode.example, answer)) for answer in answers] or [False]
    return {
        "id": episode.example["id"],
        "example": episode.example,
        "answers": answers,
        "said": [turn.text for turn in turns if turn.kind == "answer"],
        "last": last.text,
        "end": last.kind,
        "correct": correct,
        "first": correct[0],
        "next": any(correct[1:2]),
        "final": correct[-1],
        "reward": episode.reward,
        "commit": last.kind == "final",
        "well_formed": well_formed(task, turns),
        "repeats": repeats(task, answers),
        "axes": axes,
        "given": len(episode.given),
        "turns": len(episode.turns),
        "shown": len(episode.rest[1]),  # how many new turns got feedback
    }

def ratio(values):
    """The mean of a list; None where it is empty."""
    return sum(values) / len(values) if values else None

def averages(outcomes, figures):
    """The mean of each figure: {"first": 0.5, ...}. figures: their names, in one text."""
    return {figure: ratio([e[figure] for e in outcomes]) for figure in figures.split()}

def health(outcomes):
    """Early signs of a collapse, of the rollouts of a step.

    commit_wrong: of the wrong answers that got feedback, the share that was then committed.
    rollins: the share of roll-ins; rollin_...: of those after a wrong state. exact_x, exact_y: of
    the revisions that could measure it, the share that is exact along this axis, see Task.axes.
    """
    fresh = [e for e in outcomes if not e["given"]]
    rolled = [e for e in outcomes if e["given"]]
    wrong = [e for e in rolled if not e["correct"][e["given"] - 1]]
    shown_wrong = sum(e["correct"][: e["shown"]].count(False) for e in fresh)
    committed = [e for e in fresh if e["commit"] and not e["final"]]
    at_once = [e["commit"] and e["turns"] == 1 for e in wrong]
    figures = averages(fresh, "first final commit turns")
    figures |= averages(outcomes, "reward well_formed repeats")
    figures["rollins"] = len(rolled) / len(outcomes)
    figures["rollin_repair"] = ratio([e["final"] for e in wrong])
    figures["rollin_commit_wrong"] = ratio(at_once)
    measured = [axes for e in outcomes for axes in e["axes"] if axes]
    figures["exact_x"] = ratio([x for x, _ in measured])
    figures["exact_y"] = ratio([y for _, y in measured])
    figures["commit_wrong"] = len(committed) / shown_wrong if shown_wrong else None
    return figures

def update_figures(episodes, logps, entropies, references):
    """Sums over the tokens of a micro-batch. off_policy: how far the log-probs of the update are
    from those of sampling. Above rounding it tells of a wrong cache, or of wrong positions."""
    # Log-probs as the update sees them, and as they were sampled.
    now = torch.cat(logps).detach()
    then = now.new_tensor([logp for episode in episodes for logp in episode.sampled_logps])
    kl = kl_terms(now, torch.cat(references)) if references else now.new_zeros(1)
    return Counter(
        episodes=len(episodes),
        tokens=len(now),
        entropy=torch.cat(entropies).sum().item(),
        off_policy=(now - then).abs().sum().item(),
        kl=kl.sum().item(),
    )

def update_averages(figures, rollouts):
    """Means a token, and the share of rollouts that were kept, from the sums of all workers."""
    sums = sum(figures, Counter())
    tokens = max(1, sums["tokens"])
    return {
        "kept": sums["episodes"] / rollouts,
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens,
        "off_policy": sums["off_policy"] / tokens,
    }

def play_greedy(policy, task, cases, max_turns, feedback=None, hidden=False):
    """Outcomes of greedy play.

    cases: (example,) for a whole episode, (example, text) to go on from a given wrong first turn.
    feedback: what is shown after that turn, see `reply`. hidden: the question's picture is grey.
    """
    starts = []
    for number, (example, *texts) in enumerate(share(cases)):
        image = task.image(example)
        if hidden:
            image = grey(image)
        spoken = [[*policy.encode(text), policy.end_id] for text in texts]
        start = begin(policy, task, example, number, spoken, feedback, image)
        starts.append(start)
    episodes = play(policy, task, starts, 1, max_turns)
    return gather([outcome(task, episode) for episode in episodes])

def grey(image):
    """Plain grey, of the size of an image."""
    return Image.new("RGB", image.size, "#808080")

def probes(task, failed):
    """{name: arguments of `play_greedy`}.

    A probe changes the feedback to a given wrong turn, or the question's picture. Later feedback is
    true. If a probe does no harm, what it takes away was not needed.

    other_picture: the feedback of another question. blank: plain grey. hidden: the true feedback,
    but the question's picture is grey. failed: [(example, text of the wrong turn), ...]."""
    def other_picture(example, answer):
        # The next one in a circle that asks about another picture.
        at = [e["id"] for e, _ in failed].index(example["id"])
        for other, text in failed[at:] + failed[:at]:
            if other["image"] != example["image"]:
                _, _, its_answer = parse_turn(task, text)
                return task.feedback(other, its_answer)
        return task.feedback(example, answer)  # all ask about one picture

    def blank(example, answer):
        return grey(task.feedback(example, answer))

    return {
        "other_picture": {"feedback": other_picture},
        "blank": {"feedback": blank},
        "hidden": {"hidden": True},
    }

def bits(values):
    """One character a question for paired tests: 1, 0, or - where it was not asked."""
    return "".join("-" if value is None else str(int(value)) for value in values)

def rates(outcomes, most):
    """Figures of a split, rates in [0, 1]; None where nothing was counted. most: the turn limit.
    after_turn: the accuracy had it stopped after 1, 2, ... answers."""
    failed = [e for e in outcomes if not e["first"]]
    passed = [e for e in outcomes if e["first"]]
    # Had it been stopped after so many answers, its last one would count.
    after_turn = []
    for turn in range(1, most + 1):
        so_far = [e["correct"][:turn] for e in outcomes]
        after_turn.append(ratio([verdicts[-1] for verdicts in so_far]))
    return {
        "n": len(outcomes),
        **averages(outcomes, "first final commit turns"),
        "repair_own": ratio([e["final"] for e in failed]),
        "break": ratio([not e["final"] for e in passed]),
        "after_turn": after_turn,
        "first_by_question": bits(e["first"] for e in outcomes),
        "final_by_question": bits(e["final"] for e in outcomes),
    }

def repairs(policy, task, cfg, examples, wrong):
    """What becomes of given wrong first turns, {example id: text}. repair_: the last answer is
    correct; once_: the next answer is. fixed: with true feedback; the others are `probes`."""
    # The questions that these turns fail, once with true feedback, and once for each probe.
    failed = [(e, wrong[e["id"]]) for e in examples if e["id"] in wrong]
    # True feedback, and with eval.probes the others.
    views = {"fixed": {}}
    if cfg.eval.probes:
        views |= probes(task, failed)
    row = {}
    for view, changes in views.items():
        played = play_greedy(policy, task, failed, cfg.eval.max_turns, **changes)
        for figure, key in (("repair", "final"), ("once", "next")):
            verdicts = {e["id"]: e[key] for e in played}
            of_all = [verdicts.get(e["id"]) for e in examples]
            row[f"{figure}_{view}"] = ratio(verdicts.values())
            row[f"{figure}_{view}_by_question"] = bits(of_all)
    return row

def evaluate(policy, task, cfg, fixed=None, title="evaluation"):
    """(rows, fixed, outcomes by split): `rates` of each split, and `repairs` of `fixed`.

    fixed: wrong first turns, {split: {example id: text}}; None: the policy's own. All models that
    are compared get those of the SFT model. So none gains by failing first.
    """
    most = cfg.eval.max_turns
    rows, wrong, played = [], {}, {}
    for split in tqdm(task.splits, desc=title, unit="split", disable=RANK > 0):
        # Whole episodes, and then what becomes of given wrong answers.
        examples = task.examples(f"{cfg.eval.splits}_{split}")
        outcomes = play_greedy(policy, task, [(e,) for e in examples], most)
        said = [e for e in outcomes if e["said"] and not e["first"]]
        wrong[split] = {e["id"]: e["said"][0] for e in said}
        given = (fixed or wrong)[split]
        row = {"split": split, "ood": split != "id"}
        row |= rates(outcomes, most)
        row |= repairs(policy, task, cfg, examples, given)
        rows.append(row)
        played[split] = outcomes
    return rows, fixed or wrong, played

# ==================== 11. Settings ================================================================
# config.yaml names every setting once: `name: [default, allowed, sentence]`. A row of `tasks`, one
# of `profiles` and one of `methods` then change defaults, in this order.
def read_config(words=()):
    """The settings as (cfg, flat): cfg.rl.steps and so on, and {"rl.steps": 400, ...}.
    words: `key=value`, or names of YAML files of settings; the later wins. Raises UserError."""
    config, given = read_yaml(HERE / "config.yaml"), read_words(words)
    # Defaults, then the rows that task, profile and method name, then what the user gave.
    table = flatten(config["settings"])
    flat = {key: default for key, (default, _, _) in table.items()}
    for kind in ("task", "profile", "method"):
        rows = config[kind + "s"]
        table[kind][1] = "|".join(rows)  # config.yaml says "rows" there
        row = check_value(kind, given.get(kind, flat[kind]), table)
        flat |= flatten(rows[row])
    # Every value is checked, and put into its section.
    cfg = types.SimpleNamespace()
    for key, value in (flat | given).items():
        flat[key] = check_value(key, value, table)
        section, _, name = key.rpartition(".")
        place = cfg
        if section:
            place = vars(cfg).setdefault(section, types.SimpleNamespace())
        setattr(place, name, flat[key])
    return cfg, flat

def read_words(words):
    """The settings that words of the command line give: {"rl.steps": "3", ...}."""
    # The later word wins.
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            given[key] = value
        elif word.endswith((".yaml", ".yml")):
            given |= flatten(read_yaml(word))
        else:
            raise UserError(f"'{word}' is not key=value, nor a YAML file; for example: seed=3")
    return given

class Once(yaml.SafeLoader):
    """YAML takes the last of two lines for one key. This refuses both."""
    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: '{name}' is there for the second time")
            seen.add(name)
        return super().construct_mapping(node, deep)

def read_yaml(file):
    """The table that a YAML file holds. UserError if it cannot be read."""
    try:
        found = yaml.load(Path(file).read_text(encoding="utf-8-sig"), Once)
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
        part = flatten(value, key + ".") if isinstance(value, dict) else {key: value}
        for twice in flat.keys() & part.keys():  # rl: {steps: 3} and rl.steps: 4
            raise UserError(f"{twice} is given twice in one file")
        flat |= part
    return flat

def check_value(key, value, table):
    """`value` (a word, or what YAML made of it) in the type of the default. UserError if it is not
    allowed. allowed: a range `0..1`, words `a|b|c`, `yes|no`, `text`, or `text X`: one with X."""
    if key not in table:
        near = [known for known in table if known.endswith("." + key)]
        near += [*difflib.get_close_matches(key, table, 1), "see --help"]
        raise UserError(f"unknown setting '{key}'; nearest: {near[0]}")
    # A word of the command line is read as the type of the default.
    default, allowed, _ = table[key]
    text, kind, found = str(value), type(default), None
    if kind is bool:
        found = {"yes": True, "true": True, "no": False, "false": False}.get(text.lower())
    elif kind is str:
        is_text, _, part = allowed.partition(" ")
        fits = text in allowed.split("|") or is_text == "text" and part in text
        if fits and value == text:  # YAML makes True of yes, and None of nothing
            found = text
    else:
        low, high = allowed.split("..")
        with contextlib.suppress(ValueError):
            number = kind(text)
            if float(low) <= number <= float(high):  # false for nan as well
                found = number
    if found is None:
        words = allowed.replace("..", " to ").replace("|", ", ")
        words += ", a whole number" if kind is int else ""
        raise UserError(f"{key}={text} is not allowed; allowed: {words}")
    return found

# ==================== 12. A run ===================================================================
# Workers are processes that hold the same model and a share of the questions each; `torchrun`
# starts them. They meet in `gather`, and where AdamW sums their gradients. Worker 0 alone prints
# and writes. Another number of workers is another run: sums round otherwise.
STARTED = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # by torchrun
WORKERS = int(os.environ["WORLD_SIZE"]) if STARTED else 1
RANK = int(os.environ["RANK"]) if STARTED else 0

def share(items):
    """This worker's part of a list: a slice. Of ten items, worker 1 of 3 has items 3 to 5."""
    return items[len(items) * RANK // WORKERS : len(items) * (RANK + 1) // WORKERS]

def gather(items=()):
    """The inverse of `share`: the whole list, from what the workers made of their slices. It waits
    for all of them; without items it does nothing else."""
    # One worker alone gets back what it gave.
    parts = [items] * WORKERS
    if WORKERS > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]

@contextlib.contextmanager
def written_whole(path):
    """A temporary path. What is written there takes the place of a file or folder, or nothing does:
    UserError, as on a full disk, and `path` is as it was."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)  # of a folder; a file is replaced
        os.replace(temporary, path)
    except Exception as error:  # the libraries raise many kinds
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(temporary)

# These change how a sum is rounded, and nothing else. So a run may go on with other values, as when
# memory ran out; its changes.txt then says so.
ROUNDING = "policy.rows", "policy.micro"

class Run:
    """The folder of a run: settings.yaml, metrics.jsonl, checkpoints, and at the end the report. A
    run that was stopped goes on with the same command, to the same bytes."""
    has_checkpoint = False  # whether some run of this process has one

    def __init__(self, folder, flat, wait=False):
        """Lock the folder. UserError if it holds checkpoints or results of other settings, program,
        model or data. A setting that is newer than the run counts as its default."""
        self.folder, self.began = Path(folder), time.time()
        self.metrics = self.folder / "metrics.jsonl"
        self.idle = 0
        if RANK == 0:
            self.lock = data_prep.lock(self.folder, wait)
            self.check_settings(flat)
            write_file(self.folder / "settings.yaml", yaml.safe_dump(flat, sort_keys=False))
        gather()

    def check_settings(self, flat):
        """UserError if this folder holds what other settings have made."""
        # Where nothing was trained yet, any settings may begin.
        made = [*self.folder.glob("*.checkpoint"), *self.folder.glob("results.json")]
        if not made:  # nothing was trained here yet
            return
        before = read_config()[1] | read_yaml(self.folder / "settings.yaml")
        for key, value in flat.items():
            if before.get(key) == value or key in ("run", "data", "mode"):
                continue
            if key not in ROUNDING:
                raise UserError(f"{self.folder} holds a run with {key}={before.get(key)}, now "
                                f"{value} (files: digests): give run=ANOTHER_NAME or remove it")
            with open(self.folder / "changes.txt", "a") as out:
                out.write(f"{datetime.datetime.now():%F %T} {key}={value}\n")

    def log(self, **figures):
        """A line of metrics.jsonl, with what `lap` has timed. The bar shows some of it."""
        # Six digits are enough, and keep the file short.
        line = {"stage": self.stage, "step": self.step}
        for key, value in (figures | self.laps).items():
            if isinstance(value, float):  # JSON has no nan
                value = float(f"{value:.6g}") if math.isfinite(value) else None
            line[key] = value
        self.bar.set_postfix({key: line[key] for key in SHOWN if key in line}, refresh=False)
        # Steps that teach nothing, in a row: after ten of them it is time to say why.
        self.idle = self.idle + 1 if line.get("skipped") else 0
        if RANK == 0:
            if self.idle == 10:
                tqdm.write(f"warning: {why_equal(line)}", sys.stderr)
            with open(self.metrics, "a") as out:
                out.write(json.dumps(line) + "\n")

    def lap(self, name):
        """Time a part of a step: the seconds since the last lap, or since the step began."""
        now = time.time()
        self.laps[f"{name}_seconds"] = now - self.lapped
        self.lapped = now

    def steps(self, stage, count, optimizer, buffer=None):
        """1 .. count under a progress bar, from the stage's last checkpoint. Writes one every 20
        seconds, or less often: writing takes at most a twentieth of the time."""
        self.stage, self.checkpoint = stage, self.folder / f"{stage}.checkpoint"
        done, saved, cost = self.load(optimizer, buffer), time.time(), 0.0
        # The bar shows the time that is left, and `log` adds figures.
        self.bar = tqdm(range(done + 1, count + 1), initial=done, total=count, desc=stage,
                        unit="step", disable=RANK > 0)
        for self.step in self.bar:
            self.laps, self.lapped = {}, time.time()
            yield self.step
            now = time.time()
            due = self.step == count or now - saved > max(20, 20 * cost)
            if RANK == 0 and due:
                self.save(optimizer, buffer)
                saved = time.time()
                cost = saved - now

    def save(self, optimizer, buffer):
        """A checkpoint: trained weights, optimizer, buffer, number of the step. That is enough:
        randomness depends on seed and step alone, and frozen weights are in the model's folder."""
        # Both queues in one list: each state says which queue it is of.
        states = [*buffer.wrong, *buffer.correct] if buffer else []
        with written_whole(self.checkpoint) as temporary:
            torch.save((self.step, optimizer.state(), states), temporary)
        Run.has_checkpoint = True

    def load(self, optimizer, buffer):
        """Restore the stage's last checkpoint and cut the log back to it. Its step, or 0."""
        # Without a checkpoint the stage begins.
        done, tensors, states = 0, {}, []
        if self.checkpoint.is_file():
            try:
                done, tensors, states = torch.load(self.checkpoint, "cpu", weights_only=True)
            except Exception:  # many kinds
                raise UserError(f"{self.checkpoint} is damaged: remove it, and the stage begins "
                                "anew") from None
            Run.has_checkpoint = True
        for name, tensor in tensors.items():
            optimizer.state()[name].copy_(tensor)
        for state in states:
            buffer.add(state)
        gather()
        if RANK == 0:
            # Lines of steps that will be taken again are cut off.
            lines = [json.dumps(line) + "\n" for line in data_prep.read_lines(self.metrics)
                     if line["stage"] != self.stage or line["step"] <= done]
            write_file(self.metrics, "".join(lines))
        return done

    def finish(self, **content):
        """Write results.json, which says that the run is done, and remove the checkpoints."""
        # What it ran on, for whoever compares figures.
        device = platform.machine()
        if torch.cuda.is_initialized():
            device = torch.cuda.get_device_name()
        about = {"seconds": round(time.time() - self.began, 1), "device": device,
                 "workers": WORKERS, "torch": torch.__version__,
                 "transformers": transformers.__version__}
        write_file(self.folder / "results.json", json.dumps({**content, "about": about}, indent=1))
        for stage in CHARTS:
            (self.folder / f"{stage}.checkpoint").unlink(missing_ok=True)

def why_equal(figures):
    """Why the rollouts of a start have equal rewards, from the figures of a step."""
    start = "ten steps without an update, since the rollouts of each start earn the same: "
    if figures["well_formed"] < 0.1:
        return start + "nearly all are malformed; more SFT or a larger policy.max_new may help"
    if figures["final"] > 0.9:
        return start + "nearly all are correct; the pictures are too easy to learn more from them"
    if figures["final"] < 0.1:
        return start + "nearly all are wrong; raise sft.first_steps"
    return start + "raise policy.temperature"

def fingerprint(cfg):
    """What a result depends on beside the settings: the contents of program, model and data."""
    # Files by their contents. A model of the hub counts by its name alone.
    model, data = Path(source_of(cfg.model)), Path(cfg.data)
    files = []
    if data.is_file():  # own data, with the pictures
        files = [data, *(data.parent / e["image"] for e in data_prep.read_examples(data))]
    elif (data / "data.json").is_file():
        files = data.rglob("*")
    return {"program": program_of(None), "workers": WORKERS,
            "model_files": data_prep.digest(*files_of(model.glob("*"))),
            "data_files": data_prep.digest(*files_of(files))}

def files_of(paths):
    """Those that are files, in an order that does not hang on the disk."""
    return sorted(path for path in paths if path.is_file())

def program_of(names):
    """A name for what the program does: an edit of a comment leaves it as it is. names: only what
    these definitions of this file reach."""
    parts = [data_prep.code_digest(HERE / "vrrl.py", names),
             data_prep.code_digest(HERE / "data_prep.py")]
    return data_prep.digest_of(parts)

def train_sft(cfg, task, run):
    """SFT from the model of the settings. A function of its own, so that its policy is freed."""
    policy = load_policy(cfg.model, cfg)
    sft(policy, task, cfg, run)
    if RANK == 0:
        policy.save(run.folder / "model")
        run.finish()

def sft_model(words, task, parent, files):
    """The folder of the SFT model. Methods with equal SFT settings share it. It is found again as
    long as what SFT computes stays the same. files: see `fingerprint`."""
    cfg, flat = read_config(words)
    # All settings decide, but for those that act after SFT.
    others = "method", "profile", "mode", "run", "data", "rl", "reward", "buffer", "eval"
    decides = {key: value for key, value in flat.items()
               if key.split(".")[0] not in others and key not in ROUNDING}
    decides |= files
    decides["program"] = program_of(["sft", "load_policy", type(task).__name__])
    run = Run(parent / f"sft-{data_prep.digest_of(decides)}", decides, wait=True)
    if not (run.folder / "results.json").is_file():  # no other run can end it: it is locked
        train_sft(cfg, task, run)
    gather()
    return run.folder

def evaluate_base(cfg, task, folder):
    """(rows, fixed) of `evaluate` for the SFT model in a folder, made once."""
    file = folder / f"evaluation-{data_prep.digest_of(vars(cfg.eval))}.json"
    if any(gather([not file.is_file()])):  # all workers take the same branch
        policy = load_policy(folder / "model", cfg)
        rows, fixed, _ = evaluate(policy, task, cfg, title="evaluate sft")
        if RANK == 0:
            write_file(file, json.dumps([rows, fixed]))
        gather()
    return data_prep.read_json(file)

def train(cfg, words, task, run, files):
    """SFT, RL, evaluation. A stage of 0 steps does nothing."""
    results = run.folder / "results.json"
    if results.is_file():
        write_table(run, data_prep.read_json(results)["rows"])
        return
    parent = run.folder.parent
    # The model that all methods are compared with, and the one that this method starts from.
    rows, fixed = evaluate_base(cfg, task, sft_model([*words, "method=sft"], task, parent, files))
    sft_folder = sft_model(words, task, parent, files)
    policy = load_policy(sft_folder / "model", cfg)
    name = cfg.method
    if cfg.rl.steps:
        if cfg.rl.kl and not cfg.policy.lora:
            # The KL term's reference is a second copy; with adapters it is this one without.
            policy.reference = load_policy(sft_folder / "model", cfg)
        rl(policy, task, cfg, run)
        if name == "sft":
            name = "sft + RL"
    own, _, played = evaluate(policy, task, cfg, fixed, f"evaluate {name}")
    if RANK == 0:
        policy.save(run.folder / "model")
        report(run, task, {"sft": rows, name: own}, played, sft_folder)

# The figures that people look at; both raise an error where a name is no longer known.
COLUMNS = ["first", "final", "repair_own", "repair_fixed", "break", "commit"]
PROBE_COLUMNS = ["once_fixed", "once_other_picture", "once_blank", "once_hidden"]
SHOWN = ["loss", "reward", "turns", "rollin_repair"]  # beside the progress bar
SFT_CHARTS = {"loss, nats a token": "loss", "gradient norm": "grad_norm"}
CHARTS = {"first": SFT_CHARTS, "sft": SFT_CHARTS, "rl": {
    "reward": "reward", "accuracy, sampled": "first final", "commits": "commit",
    "commits of wrong answers": "commit_wrong rollin_commit_wrong",
    "repair after a wrong state": "rollin_repair", "exact revisions": "exact_x exact_y",
    "turns": "turns", "entropy": "entropy",
    "well-formed, repeats": "well_formed repeats", "states": "wrong_states correct_states",
    "shares: kept, roll-ins": "kept rollins", "gradient norm": "grad_norm", "KL": "kl",
    "off policy": "off_policy"}}

# What an episode ends with, by the kind of its last turn.
ENDS = {"final": "committed", "answer": "not committed: the limit of turns",
        "bad": "not committed: a turn that cannot be read"}

def report(run, task, models, played, *folders):
    """What people look at: report.md, curves.png, episodes.png; results.json ends the run."""
    # Curves of SFT and RL.
    files = [folder / "metrics.jsonl" for folder in (*folders, run.folder)]
    data_prep.curves(run.folder / "curves.png", files, CHARTS)
    # Up to six episodes, out of distribution first; repairs come before all others.
    pool = [e for split in reversed(task.splits) for e in played[split] if e["answers"]]
    pool.sort(key=lambda e: e["first"] >= e["final"])
    strips = [strip(task, e) for e in pool[:6]]
    data_prep.film_strip(run.folder / "episodes.png", strips, run.folder.name)
    rows = [{"method": name, **row} for name, of_split in models.items() for row in of_split]
    write_table(run, rows)
    run.finish(rows=rows)

def strip(task, e):
    """The pictures of an episode, from its outcome: a row for data_prep.film_strip."""
    example = e["example"]
    shown = [task.feedback(example, answer) for answer in e["answers"]]
    verdicts = ["right" if correct else "wrong" for correct in e["correct"]]
    return {
        "label": f"{e['id']}   {ENDS[e['end']]}   last turn: {e['last']}",
        "captions": [task.question(example)[0], *e["said"]],
        "images": [data_prep.framed(example, task.folder), *shown],
        "verdicts": ["", *verdicts[: len(shown)]],
    }

def write_table(run, rows):
    """report.md: a row for each model and split, and for the means out of distribution."""
    columns = COLUMNS
    if "once_hidden" in rows[0]:
        columns = COLUMNS + PROBE_COLUMNS
    models = {}
    for row in rows:
        models.setdefault(row["method"], []).append(row)
    table = data_prep.table(models, columns)
    write_file(run.folder / "report.md", table + "\n")
    print(table)

def own_example(cfg):
    """An example of mode=ask, of `picture` and `question`. Its box is empty, so that no answer is
    correct: nobody has said where the target is."""
    if not cfg.picture or not cfg.question:
        raise UserError("picture= and question= need each other")
    size = list(data_prep.load_image(cfg.picture).size)
    image = Path(cfg.picture).resolve()
    return {"id": cfg.picture, "image": image, "size": size, "question": cfg.question,
            "box": [0, 0, 0, 0], "within": 0}

def ask(task, cfg, folder):
    """mode=ask: one greedy episode before your eyes. Prints its turns, and paints ask.png.

    `seed` says which question of the task; `picture` and `question` give one of your own. `say` is
    a first answer that you put into the policy's mouth, and `probe` what it is shown then."""
    examples = []
    for split in reversed(task.splits):  # out of distribution first
        examples += task.examples(f"{cfg.eval.splits}_{split}")
    example = examples[cfg.seed % len(examples)]
    if cfg.picture or cfg.question:
        example = own_example(cfg)

    # The first answer, from you, and what it is shown.
    case, changes = [example], {}
    if cfg.say and task.parse(cfg.say) is None:
        known = task.say(task.solution(examples[0], random.Random(0)))
        raise UserError(f"say={cfg.say} is no answer; one would be say=\"{known}\"")
    if cfg.say:
        case.append(f"<ANSWER>{cfg.say}</ANSWER>")
    if cfg.probe != "none":
        if not cfg.say:
            raise UserError(f"probe={cfg.probe} is shown after an answer of yours: give say= too")
        others = [(e, case[1]) for e in [example, *examples]]
        changes = probes(task, others)[cfg.probe]
    policy = load_policy(cfg.model, cfg)
    episode, = play_greedy(policy, task, [case], cfg.eval.max_turns, **changes)

    # The pictures that were shown.
    row = strip(task, episode)
    if "feedback" in changes:
        row["images"][1] = changes["feedback"](example, episode["answers"][0])
    if cfg.picture:  # no frame, since it has no target
        row["images"][0] = task.image(example)
        row["verdicts"] = [""] * len(row["images"])
    folder.mkdir(parents=True, exist_ok=True)
    data_prep.film_strip(folder / "ask.png", [row], f"{cfg.model} {cfg.say}")

    # What was said.
    print(f"question: {task.question(example)[0]}")
    for number, text in enumerate(episode["said"], 1):
        print(f"turn {number}: {text}   {row['verdicts'][number]}")
    if episode["end"] != "answer":
        print(f"last turn: {episode['last']}")
    print(f"pictures: {folder / 'ask.png'}")

def check_questions(task, cfg):
    """UserError if the model cannot read a question of a split that will be used."""
    tokenizer, _ = load_parts(source_of(cfg.model), cfg.policy.max_pixels)
    splits = [f"{cfg.eval.splits}_{split}" for split in task.splits]
    if cfg.mode == "train":
        splits.append("train")
    texts = set()
    for split in splits:
        for example in task.examples(split):
            texts.update(task.question(example))
    for text in sorted(texts):
        check_text(tokenizer, f"the text {text[:80]!r}", text)

def main(words):
    """The whole of `python vrrl.py WORDS`."""
    if {"-h", "--help", "help"} & set(words):
        print("usage: python vrrl.py [FILE.yaml] [key=value ...], as in rl.steps=600\n")
        print((HERE / "config.yaml").read_text())
        return
    cfg, flat = read_config(words)
    # What is wrong with the model is said before any work.
    load_parts(source_of(cfg.model), cfg.policy.max_pixels)
    # Workers exchange lists on the CPU and gradients on their device. SFT of another run may be
    # awaited, so that they wait long.
    if WORKERS > 1:
        backend = "gloo" if device_of(cfg).type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    # The folder of the run, unless `run` names it.
    parts = [cfg.task, cfg.method, f"seed{cfg.seed}"]
    if cfg.mode != "train":
        parts = [cfg.mode, cfg.task, *Path(cfg.model).parts[-2:]]
    if cfg.profile != "default":
        parts.append(cfg.profile)
    folder = Path(cfg.run or "runs/" + "-".join(parts))
    print(f"run folder: {folder}")
    task = TASKS[cfg.task](cfg)
    check_questions(task, cfg)
    if cfg.mode == "ask":
        ask(task, cfg, folder)
        return
    files = fingerprint(cfg)
    run = Run(folder, flat | files)
    if cfg.task == "points" and RANK == 0:  # Made data have such pictures in their own folder.
        for split in task.own:
            data_prep.preview(run.folder, split, task.own[split], task.folder)
    if cfg.mode == "train":
        train(cfg, words, task, run, files)
        return
    # Another model comes first: it says which wrong answers both are to repair.
    models, fixed = {}, None
    for name in filter(None, [cfg.eval.against, cfg.model]):
        policy = load_policy(name, cfg)
        models[name], fixed, played = evaluate(policy, task, cfg, fixed, f"evaluate {name}")
    if RANK == 0:
        report(run, task, models, played)

def run_main(function, words):
    """What the user can mend becomes one line and exit code 2."""
    # Of all that can go wrong, what is a mistake of the program keeps its traceback.
    code = 2
    try:
        function(words)
        if WORKERS > 1:  # else its threads may abort the process while it ends
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        message, code = "stopped", 130
        if not Run.has_checkpoint:
            message += " before the first checkpoint: nothing was kept"
    except (UserError, OSError) as error:  # OSError: not allowed, or a full disk
        message = f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{error!r}".lower():
            raise
        message = ("error: out of memory: lower policy.rows (while it samples) or policy.micro "
                   "(while it updates); where pictures are large, give policy.max_pixels")
    message = " ".join(message.split())  # one line
    if len(message) > 300:
        message = message[:294] + " [...]"
    if Run.has_checkpoint:
        message += "; the same command goes on from the last checkpoint"
    if RANK > 0:  # worker 0 may say the same, and then it ends this process
        time.sleep(3)
    print(message, file=sys.stderr)
    raise SystemExit(code)

if __name__ == "__main__":
    run_main(main, sys.argv[1:])

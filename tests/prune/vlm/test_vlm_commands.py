"""vpruner vlm profile and evaluate on a tiny LLaVA in a folder, and what they say of bad input."""

import json

import numpy as np
import pytest
import torch
from commands import call, fails

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_vlms import PATCHES, TEXT, shared_vlm, tiny_vlm, tower_geometry
from vlm_folders import answered, save_vlm, write_questions

from vpruner.core.cost import cost_ratio
from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import read_rows
from vpruner.core.statistics import paired_difference, proportion
from vpruner.prune.vlm import evaluate as evaluation
from vpruner.prune.vlm import profile as profiling
from vpruner.prune.vlm.baselines import Pruning
from vpruner.prune.vlm.loading import normalise_answer, open_vlm
from vpruner.report.tables.vlm import vlm_latency_table

TOKENS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm") / "tiny")


@pytest.fixture(scope="module")
def vlm(folder):
    return open_vlm(str(folder), device="cpu")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"), 6)


@pytest.fixture(scope="module")
def plain(vlm, folder, questions):
    """The dense answers, without anything of ours."""
    return answered(vlm.model, folder, questions, TOKENS)


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_dense_answers_are_those_of_transformers(vlm, questions, plain, batch):
    some = evaluation.read_questions(questions)
    found = evaluation.answer_questions(vlm, some, [Pruning("random", 1.0)], batch_size=batch, max_new_tokens=TOKENS)
    assert found.of["dense"] == plain and found.of["random 1"] == plain
    assert len(set(plain)) > 1
    expected = np.mean([PATCHES * len(question.images) for question in some])
    assert found.visual_tokens == {"dense": expected, "random 1": expected}


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_models_with_several_crops_answer_and_lose_as_many_tokens_as_asked(tmp_path, questions, kind):
    folder = save_vlm(tmp_path / kind, kind=kind)
    opened = open_vlm(str(folder), device="cpu")
    some = evaluation.read_questions(questions, 3)
    asked = [Pruning("hybrid", 0.5), Pruning("random", 0.5), Pruning("fastv", 0.5)]
    found = evaluation.answer_questions(opened, some, asked, batch_size=2, max_new_tokens=2)
    assert found.of["dense"] == answered(opened.model, folder, questions, 2)[:3]
    dense = found.visual_tokens["dense"]
    assert dense > 2 * PATCHES
    for label in ("hybrid 0.5", "random 0.5", "fastv 0.5"):
        # Ends of rows and margins are not of the grid: the tower's selectors leave them.
        assert found.visual_tokens[label] == pytest.approx(dense / 2, rel=0.1), label


def test_rows_count_right_answers_over_all_and_by_kind(vlm, questions, plain, tmp_path):
    """Answers of the first four questions are planted to be right, the fifth with another spelling."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for row, answer in zip(rows[:4], plain, strict=False):
        row["answer"] = ["nothing", answer.upper() + "."]
    data = questions.with_name("planted.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [Pruning("vit", 0.25), Pruning("fastv", 0.5)]
    found = evaluation.evaluate(vlm, data, asked, batch_size=3, max_new_tokens=TOKENS)
    dense = {row["question_kind"]: row for row in found if (row["label"], row["metric"]) == ("dense", "accuracy")}
    right = np.array([True] * 4 + [False] * 2)
    kinds = {None: slice(None), "exists": slice(0, None, 2), "count": slice(1, None, 2)}
    assert dense.keys() == kinds.keys()
    answers = evaluation.answer_questions(
        vlm, evaluation.read_questions(data), asked, batch_size=2, max_new_tokens=TOKENS
    )
    for kind, chosen in kinds.items():
        assert dense[kind]["value"] == proportion("accuracy", right[chosen]).value
        for label in ("vit 0.25", "fastv 0.5"):
            row = next(
                row for row in found
                if (row["label"], row["metric"], row["question_kind"]) == (label, "accuracy_difference", kind)
            )  # fmt: skip
            expected = paired_difference("accuracy_difference", answers.right[label][chosen], right[chosen])
            assert (row["value"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)
    tokens = {row["label"]: row["visual_tokens"] for row in found}
    assert tokens["vit 0.25"] == tokens["dense"] / 4 and tokens["fastv 0.5"] == tokens["dense"] / 2
    assert {row["label"]: row["pruning"] for row in found}["fastv 0.5"]["mode"] == "fastv"


def test_the_command_prints_and_appends_rows(folder, questions, tmp_path):
    arguments = ["--data", questions, "--questions", 2, "--max-new-tokens", 1, "--mode", "vit", "--mode", "llm"]
    results = tmp_path / "results.jsonl"
    done = call("vlm", "evaluate", folder, *arguments, "--keep", 0.5, "--json", "--results", results, "-q")
    rows = json.loads(done.stdout)
    assert rows == read_rows(results)
    assert list(dict.fromkeys(row["label"] for row in rows)) == ["dense", "vit 0.5", "llm 0.5"]
    assert {row["kind"] for row in rows} == {"vlm_accuracy"} and {row["count"] for row in rows} == {1, 2}
    shown = call("vlm", "evaluate", folder, *arguments[:6], "--mode", "random", "-q").stdout
    assert "random 0.25" in shown and "change in accuracy" in shown and "of kind exists" in shown


def test_a_plan_is_evaluated_from_its_file(folder, questions, tmp_path):
    """One that freezes patches leaves the prompt as it is, and the row says what the tower still does."""
    exits = np.full((3, PATCHES), 3)
    exits[1, ::2], exits[2, ::3] = 1, 2
    plan = TokenPlan.from_exits("tower", tower_geometry(), exits)
    plan.save(tmp_path / "plan.json")
    arguments = ["--data", questions, "--questions", 2, "--max-new-tokens", 1, "--plan", tmp_path / "plan.json"]
    done = call("vlm", "evaluate", folder, *arguments, "--mode", "static", "--mode", "vit", "--json", "-q")
    rows = {row["label"]: row for row in json.loads(done.stdout)}
    static, dense = rows.pop(f"static {cost_ratio(plan):.2f} of MACs"), rows["dense"]
    assert static["pruning"]["plan_sha256"] == plan.digest and set(rows) == {"dense", "vit 0.25"}
    assert static["visual_tokens"] == dense["visual_tokens"] and static["tower"]["features"] == PATCHES
    # The last block runs behind the features.
    assert static["tower"]["queries"] == [*plan.query_counts, PATCHES + 1] == [37, 19, 19, 37]
    assert static["tower"]["mlps"] == [37, 37, 25, 37] and static["tower"]["keys"] == dense["tower"]["keys"]
    assert static["tower"]["macs"] < dense["tower"]["macs"]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Cat", "cat"),
        ("  the CAT. ", "cat"),
        ("Two dogs!", "2 dogs"),
        ("none", "0"),
        ("top-left", "top left"),
        ("an apple, a pear", "apple pear"),
        ("thecat", "thecat"),
        ("", ""),
    ],
)
def test_answers_are_compared_without_what_does_not_matter(text, same):
    assert normalise_answer(text) == same


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 holds a list, expected an object"),
        ('{"question": "what?", "answer": "cat"}', "line 2: no 'image'"),
        ('{"image": [], "question": "what?", "answer": "cat"}', "line 2: no 'image'"),
        ('{"image": "0-0.png", "question": " ", "answer": "cat"}', "line 2: no 'question'"),
        ('{"image": "0-0.png", "question": "what?"}', "line 2: no 'answer'"),
        ('{"image": "0-0.png", "question": "what?", "answer": "cat", "kind": 3}', "line 2: kind is 3"),
        ('{"image": "missing.png", "question": "what?", "answer": "cat"}', "missing.png"),
    ],
)
def test_a_line_that_is_no_question_is_named(questions, line, says):
    path = questions.with_name("bad.jsonl")
    path.write_text(questions.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        evaluation.read_questions(path)
    assert says in str(error.value) and "bad.jsonl" in str(error.value)
    assert len(evaluation.read_questions(path, 1)) == 1


# -- profile ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_profile_say_what_was_saved(folder, tmp_path):
    results = tmp_path / "results.jsonl"
    arguments = ["--mode", "vit", "--mode", "llm", "--keep", 0.25, "--rounds", 2, "--seconds", 0.2, "--new-tokens", 3]
    call("vlm", "profile", folder, *arguments, "--device", "cpu", "--results", results, "--images", 2, "-q")
    dense, vit, llm = read_rows(results)
    assert [row["label"] for row in (dense, vit, llm)] == ["dense", "vit 0.25", "llm 0.25"]
    assert dense["ratio"] == dense["decode_ratio"] == 1.0 and dense["pruning"] is None
    protocol = dense["protocol"]
    assert protocol["rounds"] == 2 and protocol["new_tokens"] == 3 and protocol["images"] == 2
    assert "interleaved" in protocol["order"] and protocol["interleaved_with"] == ["dense", "vit 0.25", "llm 0.25"]
    # Two images, and the words of the prompt.
    text = protocol["prompt_tokens"] - 2 * PATCHES
    per_token = 2 * TEXT["num_key_value_heads"] * (TEXT["hidden_size"] // TEXT["num_attention_heads"]) * 4
    layers = TEXT["num_hidden_layers"]
    assert dense["visual_tokens"] == [2 * PATCHES] * (layers + 1)
    assert vit["visual_tokens"] == [18] * (layers + 1)
    assert llm["visual_tokens"][0] == 72 and llm["visual_tokens"][-1] == 18
    for row in (dense, vit, llm):
        cached = sum(count + text for count in row["visual_tokens"][:-1])
        assert row["kv_bytes"] == cached * per_token
        assert row["p50_ms"] > 0 and row["decode_tokens_per_s"] > 0
    assert vit["peak_memory_bytes"] < dense["peak_memory_bytes"]
    # SAINT drops in block 2 of 0 to 3: it reads all and leaves a quarter.
    every, quarter = PATCHES + 1, PATCHES // 4 + 1
    assert dense["tower"]["keys"] == dense["tower"]["mlps"] == [every] * 4 and dense["tower"]["features"] == PATCHES
    assert vit["tower"]["keys"] == [every, every, every, quarter] and vit["tower"]["features"] == quarter - 1
    assert vit["tower"]["queries"] == vit["tower"]["mlps"] == [every, every, quarter, quarter]
    assert vit["tower"]["macs"] < dense["tower"]["macs"] == llm["tower"]["macs"]
    table = vlm_latency_table([dense, vit, llm])
    assert [row[-1] for row in table.rows] == ["1.000", f"{vit['tower']['macs'] / dense['tower']['macs']:.3f}", "1.000"]


def test_the_first_token_and_those_after_it_are_timed_apart(vlm, monkeypatch):
    """The tower takes 20 s and a pass of the language model 10 s, by a clock that only they move."""
    now = [0.0]

    def tick():
        return now[0]

    monkeypatch.setattr(profiling.time, "perf_counter", tick)

    def passes(seconds):
        def hook(module, args):
            now[0] += seconds

        return hook

    parts = vlm.model.model
    handles = [
        parts.vision_tower.register_forward_pre_hook(passes(20.0)),
        parts.language_model.register_forward_pre_hook(passes(10.0)),
    ]
    try:
        inputs = vlm.inputs([[profiling.random_picture(0)]], ["what is this ?"])
        times = profiling.generate_timed(vlm, inputs, 5)
    finally:
        for handle in handles:
            handle.remove()
    assert times == profiling.Times(30.0, 10.0)


def test_peak_bytes_counts_what_is_alive_at_once():
    with profiling.PeakBytes() as counter:
        first = torch.zeros(1000)
        assert counter.now == 4000
        view = first.view(10, 100)[2:]
        view.add_(1)
        assert counter.now == 4000
        second = torch.ones(500, dtype=torch.float64)
        assert (counter.now, counter.peak) == (8000, 8000)
        del second
        assert (counter.now, counter.peak) == (4000, 8000)
        del first
        assert counter.now == 4000, "the view holds it"
        del view
        assert (counter.now, counter.peak) == (0, 8000)
    given = torch.zeros(1000)
    with profiling.PeakBytes() as counter:
        given.add_(1)
        given.view(-1)
    assert counter.peak == 0


# -- prompts and models -----------------------------------------------------------------------------------------------


def test_a_chat_template_writes_the_prompt(tmp_path):
    template = (
        "{% for message in messages %}Q: {% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %} A:{% endfor %}"
    )
    opened = open_vlm(str(save_vlm(tmp_path / "chat", template)), device="cpu")
    assert opened.prompt("how many ?", 2) == "Q: <image><image> how many ? A:"
    opened.processor.chat_template = "Q: {{ messages[0].content[-1].text }}"
    with pytest.raises(UserError, match="wrote 0 <image> for 1 image"):
        opened.prompt("how many ?")


def test_without_a_template_the_prompt_is_that_of_llava(vlm):
    assert vlm.prompt("how many ?", 2) == "USER: <image>\n<image>\nhow many ? ASSISTANT:"
    with pytest.raises(UserError, match="has no image"):
        vlm.prompt("how many ?", 0)
    with pytest.raises(UserError, match="holds the placeholder <image>"):
        vlm.prompt("what is in <image> ?")


@pytest.mark.parametrize("command", ["profile", "evaluate"])
def test_bad_input_is_one_line(command, folder, questions, tmp_path):
    data = ["--data", questions] if command == "evaluate" else []

    def refused(*arguments, says):
        fails("vlm", command, *arguments, *data, "-q", says=says)

    refused(folder, "--keep", 0, says="--keep is 0,")
    refused(folder, "--mode", "static", says="--plan PLAN")
    refused(folder, "--mode", "vit", "--threshold", 0.8, says="--threshold goes with --mode llm or hybrid")
    refused(folder, "--mode", "fastv", "--layers", "5", says="fastv lets 5 layers see every token")
    refused(folder, "--device", "cudo", says="cudo")
    refused(tmp_path, says="no config.json")
    refused("no-such-folder-anywhere/at-all/x", says="there is no folder no-such-folder-anywhere/at-all/x")
    refused("nope/", says="there is no folder nope/")
    refused("./nope", says="there is no folder ./nope")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(tmp_path, says="'bert' model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    refused(tmp_path, says="cannot be loaded")


def test_a_model_that_is_not_supported_is_named_before_it_runs(tmp_path, folder):
    import transformers

    config = transformers.VipLlavaConfig(
        vision_config=tiny_vlm().config.vision_config.to_dict(), text_config=transformers.LlamaConfig(**TEXT).to_dict()
    )
    transformers.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    for path in folder.iterdir():
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fails("vlm", "profile", tmp_path, "-q", says="VipLlavaForConditionalGeneration is not a supported")


def test_a_prompt_without_an_image_has_nothing_to_prune(vlm):
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(UserError), Pruning("llm", 0.5).prepare(shared_vlm())() as run:
        run.parts.model(input_ids=ids, attention_mask=torch.ones_like(ids))

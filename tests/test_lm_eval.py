"""lm-evaluation-harness: likelihoods and answers are those of the plain model, and, where lm_eval is installed
(`make test-lm-eval`), its tasks come out as with its own `hf` model on the same weights."""

import json
import string
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import lm_eval_harness
from convert.__main__ import main as convert
from convert_samples import STYLES, TEXTS, write_hf
from evaluate import score_file
from llama.data import encode_prompt
from llama.likelihood import log_likelihoods
from llama.templates import encode_chat
from llama.tokenizer import Tokenizer
from lm_eval_harness import MoA, main, read_options
from moa.files import file_hash
from tiny import BASE, build, changed, prompts, save, shared, tokens

ONE_BY_ONE = ["lora", "soft_moa", "soft_moa_instance", "topk_moelora"]


def by_row(llm, context, continuation):
    """One row through the model alone: sum of log p, and whether each token is the largest logit."""
    row = (context + continuation)[-llm.max_seq_len - 1 :]
    prompt_len = len(row) - len(continuation)
    with torch.no_grad():
        logits = llm.model(torch.tensor([row[:-1]]), [prompt_len])[0, prompt_len - 1 :]
    log_probs = logits.double().log_softmax(-1)[range(len(continuation)), continuation]
    return log_probs.sum().item(), logits.argmax(-1).tolist() == continuation


def request(*args, task="a_task"):
    return SimpleNamespace(args=args, task_name=task)


@pytest.fixture(scope="module")
def moa():
    return MoA(str(BASE), max_seq_len=64, batch_size=3, bf16=False, device="cpu")


@pytest.mark.parametrize("name", [None, *ONE_BY_ONE])
def test_likelihoods_are_those_of_each_row_alone(name) -> None:
    llm = shared(name)
    context, long, *others = prompts(9, 80, 4, 30, 1)
    pairs = [(context, [7]), (others[1], tokens(60).tolist()), (context, [300]), (long, tokens(11).tolist())]
    pairs += [(prompt, llm.generate([prompt], 6)[0][:5]) for prompt in others] + [(others[0], [1, 2, 3])]
    for batch_size in (1, 3, 32):
        done = []
        with changed(llm, max_batch_size=batch_size):
            likelihoods = log_likelihoods(llm, pairs, done.append)
        assert sum(done) == len(pairs)
        for (log_prob, is_greedy), pair in zip(likelihoods, pairs, strict=True):
            expected, greedy = by_row(llm, *pair)
            assert abs(log_prob - expected) <= 1e-5 * max(1, abs(expected)) and is_greedy == greedy
    assert [likelihood.is_greedy for likelihood in likelihoods[4:7]] == [True] * 3


def test_pairs_that_differ_in_their_last_token_share_a_row() -> None:
    llm, rows = shared(None), []
    hook = llm.model.tok_embeddings.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        log_likelihoods(llm, [([256, 5], [1, token]) for token in range(4)] + [([256, 5, 1], [9])])
    finally:
        hook.remove()
    assert rows == [3 + 3]  # the last has another prompt, to which a router may look


@pytest.mark.parametrize("pair", [([], [1]), ([256], []), ([256], [1] * 65)])
def test_a_pair_without_a_likelihood_is_refused(pair) -> None:
    with pytest.raises(ValueError, match=r"pair 1 has \d+ tokens of context and \d+ to score: expected"):
        log_likelihoods(shared(None), [([256], [1]), pair])


def test_a_damaged_model_has_no_likelihoods() -> None:
    llm = build(None)
    llm.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        log_likelihoods(llm, [([256], [1])])


@pytest.mark.parametrize("async_lag", [0, 1])
def test_an_answer_ends_as_soon_as_it_is_complete(async_lag) -> None:
    llm, questions = shared(None), prompts(4, 9, 6, 12)
    full = llm.generate(questions, 20)
    wanted = {answer[len(answer) // 2] for answer in full}
    with changed(llm, max_batch_size=2, async_lag=async_lag):
        answers = llm.generate(questions, 20, is_complete=lambda tokens: tokens[-1] in wanted)
    ends = [next(i for i, token in enumerate(answer) if token in wanted) for answer in full]
    assert answers == [answer[: end + 1] for answer, end in zip(full, ends, strict=True)]
    assert any(end + 1 < len(answer) for answer, end in zip(full, ends, strict=True))


def test_generate_until_cuts_the_models_answers(moa) -> None:
    tokenizer, texts = moa.llm.tokenizer, ["one", "two and more", "three", "a" * 100, ""]

    def full_answer(text, max_gen_toks):
        prompt = tokenizer.encode(text, bos=True)[-(64 - max_gen_toks) :]  # the beginning is lost
        return tokenizer.decode([t for t in moa.llm.generate([prompt], max_gen_toks)[0] if t < 256])

    stop = full_answer("two and more", 20)[3:5]
    kwargs = [{"until": [stop, "never"], "max_gen_toks": 20, "do_sample": False}, {"until": "", "max_new_tokens": 9}]
    requests = [request(text, kwargs[(i + j) % 2]) for j in range(2) for i, text in enumerate(texts)]
    answers = moa.generate_until(requests, disable_tqdm=True)
    for answer, (text, options) in zip(answers, (r.args for r in requests), strict=True):
        expected = full_answer(text, 20).split(stop)[0] if "max_gen_toks" in options else full_answer(text, 9)
        assert answer == expected
    assert len(set(answers)) > 5


def test_repeats_of_a_sampled_answer_differ_and_come_again(moa) -> None:
    requests = [request("one", {"do_sample": True, "max_gen_toks": 8}) for _ in range(3)]
    answers = moa.generate_until(requests, disable_tqdm=True)
    assert len(set(answers)) == 3 and moa.generate_until(requests, disable_tqdm=True) == answers


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ((), 256, 0.0, 1.0)),
        ({"until": "x", "temperature": 0.5}, (("x",), 256, 0.5, 1.0)),
        ({"until": ["x", ""], "do_sample": False, "temperature": 0.5, "num_beams": 1}, (("x",), 256, 0.0, 1.0)),
        ({"do_sample": True, "top_p": 0.9, "max_new_tokens": 7}, ((), 7, 1.0, 0.9)),
        ({"do_sample": True, "temperature": 0.2, "max_gen_toks": "9"}, ((), 9, 0.2, 1.0)),
    ],
)
def test_generation_options(kwargs, expected) -> None:
    assert read_options("a_task", kwargs) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "task a_task: the generation option num_beams 4 is not available"),
        ({"repetition_penalty": 1.1}, "task a_task: the generation option repetition_penalty 1.1 is not available"),
        ({"max_gen_toks": 64}, "task a_task: max_gen_toks 64 must be below max_seq_len 64"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_generation_options_that_cannot_be_had_are_refused(moa, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        moa.generate_until([request("x", {"max_gen_toks": 8} | kwargs)], disable_tqdm=True)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1? <|eot|>"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


def test_a_chat_is_encoded_as_in_training() -> None:
    chat = MoA(str(BASE), template="llama3", bf16=False, device="cpu")
    expected = encode_chat(chat.llm.tokenizer, "llama3", [(m["role"], m["content"]) for m in CHAT], open_answer=True)[0]
    text = chat.apply_chat_template(CHAT)
    assert chat.tok_encode(text) == expected and text.startswith("<|begin_of_text|><|start_header_id|>system")
    begun = chat.apply_chat_template([*CHAT, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun == text + "It is"
    assert chat._encode_pair(text, " 4") == (expected, chat.llm.tokenizer.encode(" 4"))
    assert chat.tok_encode("plain") == chat.llm.tokenizer.encode("plain", bos=True)


def test_alpacas_prompt_is_that_of_training(moa) -> None:
    alpaca = MoA(str(BASE), template="alpaca", bf16=False, device="cpu")
    row = {"instruction": "Add.\n\n1 and 2", "input": ""}
    text = alpaca.apply_chat_template([{"role": "system", "content": "Add."}, {"role": "user", "content": "1 and 2"}])
    assert alpaca.tok_encode(text) == encode_prompt(alpaca.llm.tokenizer, row, 10_000)
    assert moa.tok_encode("<|eot_id|>", add_special_tokens=False) == list(b"<|eot_id|>")  # without a template: text


def test_wrong_flags_and_a_missing_package_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    for words, status, message in [
        (["--tasks", "x"], 1, "lm-evaluation-harness is not installed (pip install lm_eval==0.4.13)"),
        ([], 2, "--tasks is required"),
        (["--tasks", "x", "--log_samples"], 2, "--log_samples has no effect without --save_path"),
        (["--tasks", "x", "--include_path", "nowhere"], 2, "--include_path nowhere: no such folder"),
        (["--tasks", "x", "--method", "lora"], 2, "--method has no effect without --adapter_path"),
    ]:
        lm_eval_harness.register.cache_clear()
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == status and message in capsys.readouterr().err


# From here on with lm_eval itself


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed (make test-lm-eval installs it)")


CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
CHOICES |= {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
ANSWERS = {"output_type": "generate_until", "doc_to_target": "answer", "metric_list": [{"metric": "exact_match"}]}
NUMBER = [{"function": "regex", "regex_pattern": r"-?\d+\.?\d*", "group_select": -1}, {"function": "take_first"}]
NUMBERS = ANSWERS | {"filter_list": [{"name": "number", "filter": NUMBER}]}


def write_task(folder, name, rows, **task):
    """A task file and its rows in a folder; YAML holds all that JSON does."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    task = {"task": name, "test_split": "test", "doc_to_text": "{{question}}\nAnswer:"} | data | task
    (folder / f"{name}.yaml").write_text(json.dumps(task))


@pytest.fixture(scope="module", params=["llama3", "smol"])
def peers(request, lm_eval, tmp_path_factory):
    """lm_eval's `hf` model on a random LLaMA, and ours on what convert makes of it, with and without BOS."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("peers")
    write_hf(folder / "hf", request.param)
    bos, eos = STYLES[request.param].special[0], STYLES[request.param].special[STYLES[request.param].end]
    special = {"eos_token": eos, "pad_token": eos}
    if request.param == "llama3":  # whose tokenizer writes BOS
        file = folder / "hf" / "tokenizer.json"
        content = json.loads(file.read_text())
        begin = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        ids = {bos: {"id": bos, "ids": [content["added_tokens"][0]["id"]], "tokens": [bos]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": begin,
            "pair": begin,
            "special_tokens": ids,
        }
        file.write_text(json.dumps(content))
        special["bos_token"] = bos
    convert(["hf", "--input", str(folder / "hf"), "--output_dir", str(folder / "meta"), "--dtype", "fp32"])
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "hf" / "tokenizer.json"), **special).save_pretrained(
        folder / "hf"
    )
    theirs = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=4, max_length=64)
    theirs.model.generation_config.eos_token_id = [*Tokenizer(folder / "meta" / "tokenizer.model").stop_ids]
    ours = lm_eval_harness.register()(str(folder / "meta"), max_seq_len=64, batch_size=4, bf16=False, device="cpu")
    return theirs, ours


PAIRS = [(TEXTS[0], " the"), (TEXTS[0], " tin"), ("", "the hat"), (TEXTS[1] + " ", "12 hats"), ("in " * 100, "the tin")]


def test_likelihoods_are_those_of_lm_evals_own_model(peers) -> None:
    theirs, ours = ([*lm.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)] for lm in peers)
    for (log_prob, is_greedy), (expected, greedy) in zip(ours, theirs, strict=True):
        assert abs(log_prob - expected) < 1e-3 and is_greedy == greedy


def test_rolling_likelihoods_are_those_of_lm_evals_own_model_and_of_a_hand(peers) -> None:
    texts = [TEXTS[0], " ".join(TEXTS[:2]) * 8, "t"]
    theirs, ours = (lm.loglikelihood_rolling([request(text) for text in texts], disable_tqdm=True) for lm in peers)
    assert ours == pytest.approx(theirs, abs=1e-3)
    llm, begin = peers[1].llm, peers[1].prefix_token_id
    for text, log_prob in zip(texts, ours, strict=True):
        row = llm.tokenizer.encode(text, bos=True)
        whole, first = [begin, *row], min(64, len(row))
        expected = by_row(llm, whole[:1], row[:first])[0]
        for done in range(first, len(row), 64):  # a later window reads 64 tokens, and scores those that are new
            end = min(done + 64, len(row))
            expected += by_row(llm, whole[end - 64 : done + 1], row[done:end])[0]
        assert abs(log_prob - expected) < 1e-4
    assert len(row) < 64 < len(llm.tokenizer.encode(texts[1]))


def test_tasks_come_out_as_with_lm_evals_own_model(peers, lm_eval, tmp_path) -> None:
    from lm_eval.tasks import TaskManager

    words = "in the thin hat tin 12 345 hein !".split()
    rows = [
        {"question": " ".join(words[i % 5 :: 2]), "choices": words[i % 3 : i % 3 + 4], "label": i % 4, "answer": "x"}
        for i in range(24)
    ]
    write_task(tmp_path, "choices", rows, **CHOICES, num_fewshot=0)
    kwargs = {"until": [*string.ascii_uppercase], "max_gen_toks": 12}
    write_task(tmp_path, "answers", rows, **ANSWERS, generation_kwargs=kwargs)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = [lm_eval.simple_evaluate(lm, tasks=["choices", "answers"], task_manager=manager) for lm in peers]
    texts = [[sample["resps"] for sample in result["samples"]["answers"]] for result in results]
    assert texts[0] == texts[1] and len({str(text) for text in texts[0]}) > 3
    assert results[0]["results"] == results[1]["results"] and 0 < results[0]["results"]["choices"]["acc,none"] < 1


@pytest.fixture
def own_tasks_alone(lm_eval, monkeypatch):
    """Without lm_eval's thousands of tasks, which take it seconds to list."""
    import lm_eval.tasks

    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


def test_scores_of_the_command_agree_with_evaluate(own_tasks_alone, tmp_path, capsys) -> None:
    adapter = save(build("soft_moa"), tmp_path / "run")
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 40, "until": ["\0"]}
    questions = [f"How much is {i} + 1?" for i in range(12)]

    def result(answers):
        rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
        write_task(tmp_path, "sums", rows, **NUMBERS, generation_kwargs=kwargs)
        words = ["--ckpt_dir", BASE, "--adapter_path", adapter, "--tasks", "sums", "--include_path", tmp_path]
        words += ["--save_path", tmp_path / "out" / "r.json", "--log_samples", "--bf16", False, "--device", "cpu"]
        main([str(word) for word in words])
        return json.loads((tmp_path / "out" / "r.json").read_text())

    first = result(["none"] * 12)
    numbers = [sample["filtered_resps"][0] for sample in first["samples"]["sums"]]
    assert sum(number != "[invalid]" for number in numbers) >= 6
    answers = [n if n != "[invalid]" and i % 2 else "12345" for i, n in enumerate(numbers)]  # about half are right
    second = result(answers)
    assert "|sums |" in capsys.readouterr().out and second["config"]["model_args"]["adapter_path"] == str(adapter)
    assert second["config"]["adapter_sha256"] == file_hash(adapter)
    texts = [sample["resps"][0][0] for sample in second["samples"]["sums"]]
    predictions = [{"answer": a, "generate": t} for a, t in zip(answers, texts, strict=True)]
    (tmp_path / "demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    score = second["results"]["sums"]["exact_match,number"]
    assert 100 * score == pytest.approx(score_file(tmp_path / "demo.jsonl").published.percent) and 0 < score < 1


def test_what_is_no_task_is_refused(own_tasks_alone, tmp_path, capsys) -> None:
    write_task(tmp_path, "empty", [], **ANSWERS)
    for task, message in [
        ("emty", "--tasks: lm_eval has no task 'emty' (nearest: empty)"),
        ("empty", "--tasks empty: cannot be loaded"),
    ]:
        with pytest.raises(SystemExit):
            main(["--ckpt_dir", str(BASE), "--tasks", task, "--include_path", str(tmp_path)])
        assert message in capsys.readouterr().err

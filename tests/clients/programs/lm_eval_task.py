"""lm-eval: a local task that generates, with local-completions."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{"test": "{rows}"}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
GENERATES = """
task: degrees
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 32, temperature: 0.0}
metric_list:
  - metric: exact_match
"""

with tempfile.TemporaryDirectory() as folder:
    rows = Path(folder) / "rows.jsonl"
    rows.write_text(json.dumps({"question": "How warm is Oslo?", "answer": "It is 7 degrees in Oslo."}) + "\n")
    (Path(folder) / "degrees.yaml").write_text(GENERATES + COMMON.format(rows=rows))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"model=tiny,base_url={os.environ['KVIST_URL']}/v1/completions,tokenizer_backend=None,"
        "tokenized_requests=False",
        tasks=["degrees"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
    )
assert found["results"]["degrees"]["exact_match,none"] == 1.0, found["results"]

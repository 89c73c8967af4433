"""Programs that run in the environment of llama.cpp (`tests.clients.llama_cpp`), with a JSON of arguments."""

from __future__ import annotations

# Logits of `tokens` to a file, 20 greedy tokens after `prompt`, and how `texts` are tokenised.
LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama

job = json.loads(sys.argv[1])
tokens = job["tokens"]
model = Llama(job["file"], n_ctx=len(tokens) + 64, n_batch=len(tokens) + 64, n_threads=job.get("threads", 1),
              n_threads_batch=job.get("threads", 1), logits_all=True, type_k=0, type_v=0, verbose=False)
model.eval(tokens)
np.save(job["logits"], np.array(model.scores[: len(tokens)], dtype=np.float32))
greedy = []
if job.get("prompt"):
    model.reset()
    model.eval(job["prompt"])
    for i in range(20):
        greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(greedy[-1:])
words = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job.get("texts", [])]
print(json.dumps({"greedy": greedy, "tokens": words}))
"""

# llama.cpp's own quantiser: a file to one of type `file_type`, with an importance file (npz) or without. From a file in
# blocks to floats (type 0) it is llama.cpp's own dequantiser.
QUANTISE = """
import ctypes, json, sys
import llama_cpp

job = json.loads(sys.argv[1])
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = job["file_type"]
params.nthread = job.get("threads", 1)
params.allow_requantize = job.get("from_blocks", False)
if job.get("imatrix"):
    import numpy as np
    data = np.load(job["imatrix"])
    kind = llama_cpp.llama_model_imatrix_data
    keep = [(name.encode(), np.ascontiguousarray(data[name], dtype=np.float32)) for name in data.files]
    rows = (kind * (len(keep) + 1))()
    for row, (name, values) in zip(rows, keep):
        row.name, row.size = name, values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(rows, ctypes.POINTER(kind))
code = llama_cpp.llama_model_quantize(job["source"].encode(), job["target"].encode(), ctypes.byref(params))
print(code)
"""

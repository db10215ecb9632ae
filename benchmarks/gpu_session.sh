#!/usr/bin/env bash
# All checks and benchmarks that need a CUDA GPU, in one call of less than ten minutes:
#
#   benchmarks/gpu_session.sh                     # results in benchmarks/results
#   OUT=/some/folder TOTAL=500 benchmarks/gpu_session.sh
#   DEVICE=cpu SMALL=1 TOTAL=300 benchmarks/gpu_session.sh    # a trial run without a GPU
#
# It reports the machine, checks the kernels against float64, and times the head, whole training steps and growth. Each
# part has a time limit; if one fails or exceeds it, the next still runs, and its measurements so far are kept. The exit
# status is 1 if any part failed.
#
# OUT     folder for <device>.csv, .png and .md, gpu-check.json, gpu-environment.txt, gpu-session.json and .log
# TOTAL   seconds for all parts together
# PYTHON  interpreter with torch, triton, transformers, datasets, accelerate and peft; liger-kernel and
#         cut-cross-entropy are measured too if they are installed
# PARTS   names of the parts to run
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${OUT:-benchmarks/results}
TOTAL=${TOTAL:-570}
DEVICE=${DEVICE:-cuda}
SMALL=${SMALL:-}
PARTS=${PARTS:-check head steps tall growth wide bart plot}
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

mkdir -p "$OUT" || exit 2
LOG=$OUT/gpu-session.log
: >"$LOG"
started=$SECONDS
failed=0
summary=

say() { printf '%s\n' "$*" | tee -a "$LOG"; }

# part NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, and no longer than what is left of TOTAL
part() {
  local name=$1 limit=$2 left rc before
  shift 2
  case " $PARTS " in *" ${name%%-*} "*) ;; *) return ;; esac
  left=$((TOTAL - (SECONDS - started)))
  if [ "$name" != plot ]; then left=$((left - 25)); fi  # leave time to draw the picture
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  before=$SECONDS
  if [ "$limit" -lt 10 ]; then
    rc=125
    say "== $name: left out, no time is left"
  else
    say "== $name (at most $limit s)"
    # INT first, so that Python can finish writing its files
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG"
    rc=${PIPESTATUS[0]}
  fi
  say "== $name: exit $rc after $((SECONDS - before)) s"
  if [ "$rc" -ne 0 ]; then failed=1; fi
  summary="$summary${summary:+,}
 {\"part\": \"$name\", \"exit\": $rc, \"seconds\": $((SECONDS - before))}"
  printf '[%s\n]\n' "$summary" >"$OUT/gpu-session.json"
}

say "== environment"
{
  date -u +%FT%TZ
  git rev-parse --short HEAD 2>/dev/null || echo "no git checkout: the CSV cannot name its commit"
  nvidia-smi 2>&1 || true
  "$PYTHON" - <<'PYTHON'
import importlib
import platform
import sys

print("Python", platform.python_version())
missing = []
for name in ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "numpy", "matplotlib",
             "liger_kernel", "cut_cross_entropy"):
    try:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", "present"))
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
        missing.append(name)
try:
    import torch
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        print(p, torch.version.cuda, torch.cuda.get_device_capability(0))
except Exception as error:
    print(error)
sys.exit(bool(set(missing) & {"torch", "transformers", "accelerate", "datasets"}))
PYTHON
} >"$OUT/gpu-environment.txt" 2>&1
environment=$?
tee -a "$LOG" <"$OUT/gpu-environment.txt"
if [ "$environment" -ne 0 ]; then
  say "A package that is needed cannot be imported (see above): install it for $PYTHON, or name another PYTHON."
  exit 2
fi

if [ "$DEVICE" = cuda ]; then
  name=$("$PYTHON" -c 'import torch; from benchmarks.common import slug; print(slug(torch.device("cuda")))') || exit 2
else
  name=rehearsal
fi
CSV=$OUT/$name.csv
measured=(--device "$DEVICE" --output "$CSV")

if [ -n "$SMALL" ]; then
  part check 120 "$PYTHON" -m benchmarks.gpu_check --device "$DEVICE" --small --output "$OUT/gpu-check.json"
  part head 120 "$PYTHON" -m benchmarks.head "${measured[@]}" --tokens 64 --dims 64 --vocab 4096 --samples 3 \
    --dtypes bf16
  part steps 120 "$PYTHON" -m benchmarks.training_step "${measured[@]}" --models gpt2 --dtypes bf16 --sequences 1 \
    --length 32 --samples 2
  part growth 60 "$PYTHON" -m benchmarks.growth "${measured[@]}" --dtype bf16 --tokens 32 64 --vocab 4096 \
    --dims 64 --samples 3
else
  # the most important parts first: correctness, then speed at the sizes of GPT-2 and Llama 3
  part check 120 "$PYTHON" -m benchmarks.gpu_check --output "$OUT/gpu-check.json"
  part head 120 "$PYTHON" -m benchmarks.head "${measured[@]}" --dtypes bf16 --dims 768 --vocab 50257 --budget 20
  # each peak memory is measured in a new process, which takes most of the time
  part steps 100 "$PYTHON" -m benchmarks.training_step "${measured[@]}" --models gpt2 --dtypes bf16 --sequences 8 \
    --length 1024 --budget 10
  part tall 110 "$PYTHON" -m benchmarks.head "${measured[@]}" --dtypes bf16 --dims 4096 --vocab 128256 --budget 30
  part growth 60 "$PYTHON" -m benchmarks.growth "${measured[@]}" --dtype bf16 --tokens 1024 2048 4096 8192 16384 \
    --vocab 8192 32768 131072 262144 --dims 256 1024 4096 --budget 3
  # without the variants that torch.compile needs half a minute for
  part wide 90 "$PYTHON" -m benchmarks.head "${measured[@]}" --dtypes fp32 bf16 --budget 8 --samples 20 \
    --only products "linear CE" "ours, ce" chunk Liger apple
  part bart 100 "$PYTHON" -m benchmarks.training_step "${measured[@]}" --models bart --dtypes bf16 --sequences 16 \
    --length 512 --budget 10
fi

part plot 40 bash -c '"$0" -m benchmarks.plot "$1" --table >"${1%.csv}.md" && "$0" -m benchmarks.plot "$1"' "$PYTHON" "$CSV"

say "== all parts: $((SECONDS - started)) s; results in $OUT"
exit "$failed"

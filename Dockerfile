# A CUDA machine: docker build -t speedyzero . && docker run --gpus all -v "$PWD/runs:/speedyzero/runs" speedyzero --env Pong-v5
# The wheels of torch bring CUDA with them; the host needs the NVIDIA driver and the container toolkit alone.
FROM python:3.12-slim
# Triton compiles a small launcher with a C compiler the first time that a kernel runs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /speedyzero
COPY . .
RUN pip install --no-cache-dir -e '.[watch]'
# SIGTERM, which `docker stop` sends, ends a run saved; give it more than the usual ten seconds: docker stop -t 60.
ENTRYPOINT ["python", "-m", "speedyzero"]

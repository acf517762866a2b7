# What trains and folds: the Ray head with the runner, the Ray workers, and the averager. Holds torch and ray.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

# The averager's working space is a volume; a new one takes the owner of this folder.
RUN useradd --uid 10001 --user-group --create-home wa && install -d -o 10001 -g 10001 /scratch

# Torch is by far the largest layer, so it comes first. Its index may hold nothing else: what torch needs comes from
# the ordinary one. Empty means the ordinary one for torch too, whose Linux build brings CUDA.
WORKDIR /src
ARG TORCH_INDEX_URL=
COPY constraints.txt ./
RUN TORCH="$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir --disable-pip-version-check --no-deps \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$TORCH" \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt "$TORCH"

COPY pyproject.toml deploy/images/requirements.py ./
RUN python requirements.py torch recipes train > requirements.txt \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt

COPY --chmod=755 deploy/images/healthcheck.py /usr/local/bin/healthcheck
COPY --chmod=755 deploy/images/with-keys.sh /usr/local/bin/wa-with-keys
COPY --chmod=755 deploy/images/ray-head.sh /usr/local/bin/wa-ray-head
COPY --chmod=755 deploy/images/ray-worker.sh /usr/local/bin/wa-ray-worker
COPY README.md LICENSE ./
COPY wa_core wa_core
COPY services services
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps .

USER 10001:10001
WORKDIR /home/wa
ENV PYTHONUNBUFFERED=1
CMD ["python", "-m", "services.averager"]

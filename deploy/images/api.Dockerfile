# The API: the base installation, which holds neither torch nor ray.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent wa
COPY --chmod=755 deploy/images/healthcheck.py /usr/local/bin/healthcheck
COPY --chmod=755 deploy/images/with-keys.sh /usr/local/bin/wa-with-keys

# What the project needs comes before the project, so that a change of code installs nothing anew.
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/images/requirements.py ./
RUN python requirements.py > requirements.txt \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY wa_core wa_core
COPY services services
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps .

USER 10001:10001
WORKDIR /
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
CMD ["python", "-m", "services.api"]

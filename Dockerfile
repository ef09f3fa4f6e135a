# pgrecall without a database in it. docs/containers.md says how to run it.
#
#   docker build -t pgrecall .                             embeds through an OpenAI-compatible server
#   docker build -t pgrecall --build-arg EXTRAS=model .    with the local model inside

FROM python:3.13-slim AS build
ARG EXTRAS=""
WORKDIR /srv/pgrecall
RUN python -m venv --without-pip /opt/pgrecall
# Editable, because app/schema.py looks for alembic.ini and migrations/ beside app/. The package is hollow so far: this
# layer, which downloads, is made again only when a dependency changes.
COPY pyproject.toml constraints.txt README.md ./
COPY app/__init__.py app/
RUN mkdir app/api && python -m pip --python /opt/pgrecall/bin/python install --no-cache-dir \
    --constraint constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}"
COPY app app
COPY migrations migrations
COPY alembic.ini ./
# Nothing can be compiled later: the service may not write here. Unchecked, so that file times do not matter.
RUN /opt/pgrecall/bin/python -m compileall -q --invalidation-mode unchecked-hash app migrations

FROM python:3.13-slim
RUN groupadd --gid 10001 pgrecall && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin pgrecall
COPY --from=build /opt/pgrecall /opt/pgrecall
COPY --from=build /srv/pgrecall/alembic.ini /srv/pgrecall/
COPY --from=build /srv/pgrecall/migrations /srv/pgrecall/migrations
COPY --from=build /srv/pgrecall/app /srv/pgrecall/app
ENV PATH=/opt/pgrecall/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /srv/pgrecall
# By number: Kubernetes' runAsNonRoot does not look names up.
USER 10001:10001
EXPOSE 8000
# Not through urllib, which would ask a proxy named in the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", "\
import http.client; \
asked = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); \
asked.request('GET', '/health/live'); \
raise SystemExit(asked.getresponse().status != 200)"]
# Started without a shell, the process gets SIGTERM itself. It listens on the container's own loopback until told
# otherwise: a database without keys asks for none, and `docker run -p` publishes to every network the machine is in.
ENTRYPOINT ["pgrecall"]
CMD ["serve"]

.DEFAULT_GOAL := help
PY := .venv/bin/python
.PHONY: help run test check tools protos bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

run: .venv/site ## Install, start the whole stack, answer a first chat, keep serving
	@exec $(PY) manage.py up

test: .venv/dev tools ## Install what tests need and pass them all
	$(PY) -m pytest -n 2 --dist loadgroup

# Debian packages of what tests drive: a browser, and an SSH server that they start themselves.
tools: ## Make sure that tests have chromium and sshd
	@command -v chromium >/dev/null && test -x /usr/sbin/sshd || { \
		test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium openssh-server >/dev/null; } \
		|| { echo 'the tests need chromium and sshd: sudo apt-get install chromium openssh-server' >&2; exit 1; }

check: .venv/dev ## Lint, types, import contracts, migrations and stubs in step
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	SECRET_KEY=unused .venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m tests.check_migrations
	$(PY) -m tests.check_protos

protos: .venv/dev ## Regenerate the gRPC stubs
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. \
		--mypy_out=. --mypy_grpc_out=. protos/inference.proto

bench: .venv/dev ## Measure tokens/s and time to first token at 1, 8 and 32 streams
	$(PY) -m tests.bench

clean: ## Remove the virtual environment and all state
	rm -rf .venv var

.venv/site: requirements.txt gpu_daemon/requirements.txt
	test -x $(PY) || python3.11 -m venv .venv || python3 -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: tests/requirements.txt .venv/site .venv/transformers-4.46 .venv/transformers-4.57
	.venv/bin/pip install --disable-pip-version-check -r tests/requirements.txt
	touch $@

# Earlier releases in folders of their own, for the tests of their cache shapes; all else they import is the site's.
.venv/transformers-%: tests/transformers/%.txt .venv/site
	rm -rf $@
	.venv/bin/pip install --disable-pip-version-check --no-deps --target $@ -r $<
	touch $@

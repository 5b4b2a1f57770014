# make demo: an environment, then the shipped weights exported to int8, tried on photos, and timed.
# make web-demo: the shipped weights in an installable page, served on this machine.
# make test: everything that CI runs. None needs root. PYTHON=... names the Python to use.

.PHONY: demo web-demo test

demo: .venv/demo
	.venv/bin/ghostedge export ghostnetv3-small-1.0x --int8 -o demo
	.venv/bin/ghostedge predict demo/model_int8.tflite ghostedge/photos/*.jpg
	.venv/bin/ghostedge bench demo

web-demo: .venv/demo
	.venv/bin/ghostedge export ghostnetv3-small-1.0x --recipe web -o demo
	.venv/bin/ghostedge deploy web demo -o demo-web
	@echo "The page is at http://localhost:8000/ until Ctrl-C."
	@.venv/bin/python -m http.server 8000 --bind localhost --directory demo-web

# Two workers, because each may hold PyTorch and TensorFlow; a file's tests share its exports.
test: .venv/test .venv-other/demo .venv-mediapipe/1.2.2 .venv-triton/2.73.0 .venv-tflm/0.dev20261023182759 .cache/npm
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy ghostedge
	.venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10

# Stamps: an environment is installed once, and again when pyproject.toml changes.
SIZE := 4 to 5 GB to download, 8 GB on disk (PyPI's PyTorch brings CUDA along; no GPU is needed)
.venv/demo: EXTRAS := export,bench
.venv/test: EXTRAS := all,cluster,test
.venv/demo .venv/test: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv what is not there yet: at most $(SIZE)."
	.venv/bin/python -m pip install --editable '.[$(EXTRAS)]'
	@touch $@

.venv/bin/python:
	python=$$(.ci/find-python) && $$python -m venv --clear .venv

# One export is tested on the other pin set too, where a Python for it runs. OTHER_PYTHON=none leaves it out.
.venv-other/demo: pyproject.toml | .venv/bin/python
	@others=$$(.venv/bin/python -c 'import sys; print("3.12 3.13" if sys.version_info < (3, 12) else "3.11 3.10")'); \
	if python=$$(PYTHON=$(OTHER_PYTHON) .ci/find-python $$others 2>/dev/null); then \
	    echo "Installing into .venv-other, for one test on another Python: $(SIZE)."; \
	    $$python -m venv .venv-other && \
	    .venv-other/bin/python -m pip install --editable '.[export,bench]' && touch $@; \
	else \
	    echo "No Python $$others runs here: the export test on another Python will be skipped."; \
	fi

# MediaPipe for one test, 0.5 GB on disk; it brings versions of its own. The stamp is its version. Its
# system libraries are in .ci/system-packages.sh: the test is skipped where they are not installed.
.venv-mediapipe/%: | .venv/bin/python
	.venv/bin/python -m venv --clear .venv-mediapipe
	.venv-mediapipe/bin/python -m pip install mediapipe==$*
	@touch $@

# Triton's own schema for one test, 0.2 GB on disk; its protobuf is another than ours.
.venv-triton/%: | .venv/bin/python
	.venv/bin/python -m venv --clear .venv-triton
	.venv-triton/bin/python -m pip install 'tritonclient[grpc]==$*'
	@touch $@

# The browser page's npm packages, 45 MB, for its tests.
.cache/npm: deploy/web/package-lock.json | .venv/test
	@if command -v npm >/dev/null; then \
	    XDG_CACHE_HOME=.cache .venv/bin/python -c 'from ghostedge.deploy import web; [web.package(name) for name in \
	    ("@litertjs/core", "@litertjs/wasm-utils", "onnxruntime-web")]' && touch $@; \
	else \
	    echo "There is no npm here: the tests of the browser page will be skipped."; \
	fi

# TensorFlow Lite Micro for the tests of deploy/microcontroller, 0.1 GB on disk; it comes for Linux on x86
# only, so that elsewhere they are skipped.
.venv-tflm/%: | .venv/bin/python
	.venv/bin/python -m venv --clear .venv-tflm
	[ "$$(uname -sm)" != "Linux x86_64" ] || .venv-tflm/bin/python -m pip install tflite-micro==$*
	@touch $@

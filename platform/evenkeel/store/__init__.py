"""What a run leaves behind, on a local path or any fsspec URL.

errors         what can go wrong, in one line each
files          whole files: read, replace atomically, create only if absent, stream
options        how the file systems of object stores are opened
failures       what their clients raise: whether it passes, and what it means, without secrets
retry          errors that pass are waited out
lines          JSON lines: append and follow
journal        what the controller needs to go on; also the fence between two controllers
lease          who runs a run, and whether another may
run_directory  the layout of a run's directory
final          the trained model as safetensors
"""

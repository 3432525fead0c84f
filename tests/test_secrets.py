"""What counts as a secret, and what has to stay readable."""

from __future__ import annotations

import pytest

from megatron_mup.secrets import (
    is_secret_file,
    is_secret_name,
    mask_code,
    mask_data,
    mask_text,
    secret_values,
)


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASSWD", "SLURM_JWT",
     "MY_CREDENTIALS", "NCCL_AUTH", "SSH_PRIVATE", "api-key", "sessionCookie", "SLACK_WEBHOOK",
     "MEGATRON_MUP_PAT", "pat", "GH_PAT_2"],
)  # fmt: skip
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_DEBUG",
        "SLURM_JOB_ID",
        "PWD",
        "OMP_NUM_THREADS",
        "TOKENIZER_MODEL",
        "AUTHOR",
        "PATH",
        "LD_LIBRARY_PATH",
        "PATTERN",
        "COMPAT",
    ],
)
def test_other_names_are_not(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [".env", "launch/env", "site/.env.local", "a/.netrc", "client_secret.json", "credentials",
     "keys/server.pem", "deploy.key", ".ssh/config", "id_rsa", ".aws/config", "PASSWORDS.txt"],
)  # fmt: skip
def test_names_of_secret_files_are_known(name: str) -> None:
    assert is_secret_file(name)


@pytest.mark.parametrize(
    "name", ["launch/env.example", "environment.py", "keyboard.py", "data/tokens.py", "a/keys.md"]
)
def test_other_files_are_not(name: str) -> None:
    assert not is_secret_file(name)


@pytest.mark.parametrize(
    "text",
    [
        "+export WANDB_API_KEY=s3cr3tvalue",
        "+  api_key: s3cr3tvalue",
        "password = 's3cr3tvalue'",
        '{"auth_token": "s3cr3tvalue"}',
        "sbatch --api-key s3cr3tvalue run.sh",
        "--token=s3cr3tvalue",
        "MEGATRON_MUP_PAT=s3cr3tvalue",
        "curl -u me:s3cr3tvalue host",
        "curl --user 'me:s3cr3tvalue' host",
        "curl --user=me:s3cr3tvalue host",
        "git clone https://me:s3cr3tvalue@host/repo",
        "https://s3cr3tvalue@host/repo",
        "postgres://me:s3cr3tvalue@@host/db",
        "Authorization: Bearer s3cr3tvalue00",
        "machine api.wandb.ai login user password s3cr3tvalue",
        "machine api.wandb.ai\n  login user\n  password s3cr3tvalue",
        "-----BEGIN RSA PRIVATE KEY-----\ns3cr3tvalue\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\ns3cr3tvalue",
        "push('hf_s3cr3tvalueABCDEFGHIJ')",
        "sk-s3cr3tvalueABCDEFGHIJ",
        "ghp_s3cr3tvalueABCDEFGHIJ0123456789",
        "PIN_PASSWORD=12345678 # s3cr3tvalue was here".replace("s3cr3tvalue", ""),
    ],
)
def test_a_secret_is_taken_out_of_text(text: str) -> None:
    masked = mask_text(text, [])
    assert "s3cr3tvalue" not in masked
    assert "12345678" not in masked
    assert "***" in masked


@pytest.mark.parametrize(
    "text",
    [
        "eod_token: 2\nbos_token: null\nbase_train_tokens: 190000000000",
        "--tokenizer-model /data/t5.model --eod-token 2",
        "export WANDB_API_KEY=$KEY_OF_SITE",
        "lr: 0.01\nname: abs_mup\ntrain_data_path: [/data/shards/train]",
        "https://example.org/a@b",
        "export PATH=/opt/bin:/usr/bin",
        "date -u +%H:%M:%S",
        "docker run -u 1000:1000 image",
        "sort -u list",
        "KeyError: 'hidden_size'",
    ],
)
def test_settings_stay_readable(text: str) -> None:
    assert mask_text(text, []) == text


def test_code_stays_code_but_for_what_can_only_be_a_secret() -> None:
    code = 'KEY = "checksums.json"\ntoken = tokens[0]\ndef f(key: str = "a") -> None: ...\n'
    assert mask_code(code, []) == code
    assert mask_code('API_KEY = "0123456789abcdef0123456789abcdef01234567"', []) == "API_KEY = ***"
    assert mask_code('digest = "0123456789abcdef0123456789abcdef01234567"', []).endswith('4567"')


def test_the_values_of_secret_variables_are_found_wherever_they_are() -> None:
    environment = {
        "WANDB_API_KEY": "plainword99",
        "HF_TOKEN": "12345",
        "MY_SECRET": "true",
        "SITE_PASSWORD": "offline",
        "OTHER": "harmless99",
    }
    values = secret_values(environment)
    # A small number, a switch and a common word would be cut out of everything.
    assert values == ["plainword99"]
    assert mask_text("a plainword99 in prose, harmless99", values) == "a *** in prose, harmless99"
    assert mask_code("x = f('plainword99')", values) == "x = f('***')"


def test_plain_data_is_masked_inside_and_keeps_its_shape() -> None:
    data = {"campaign": 5, "url": "https://me:s3cr3t@host", "runs": ["api_key=s3cr3t", None, 0.5],
            "wandb": {"api_key": "s3cr3t", "name": "a"}}  # fmt: skip
    assert mask_data(data, []) == {
        "campaign": 5,
        "url": "https://***@host",
        "runs": ["api_key=***", None, 0.5],
        "wandb": {"api_key": "***", "name": "a"},
    }

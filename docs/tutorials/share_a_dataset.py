# %% [markdown]
# # Share a dataset
#
# A run folder holds everything that a run measured. An export of it is a dataset that others open without dynprobe,
# with a page that says what it is, units in the columns, and checksums. It becomes a run again bit for bit.

# %%
from pathlib import Path

import pandas as pd

import dynprobe as dp

run = dp.run("tiny-llama", perturb="alpha=0.3,layers=0", limit=4, max_new_tokens=8, states=True, out="runs")
done = run.export("hf", "my-dataset", licence="cc-by-4.0")
print(done)
for path in sorted(p for p in Path("my-dataset").rglob("*") if p.is_file()):
    print(f"{path.stat().st_size:9,}  {path}")

# %% [markdown]
# ## The page
#
# The front matter names a configuration per table, so that `datasets.load_dataset("my-dataset", "samples")` and the
# hub's viewer open it.

# %%
page = Path("my-dataset/README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
print(page[:1800], "…")

# %% [markdown]
# ## Read it without dynprobe
#
# Any Parquet reader will do. What a column is stands in the file itself.

# %%
import pyarrow.parquet as pq

part = next(Path("my-dataset/samples").glob("*.parquet"))
schema = pq.read_schema(part)
{key.decode(): value.decode() for key, value in schema.field("kappa_phase").metadata.items()}

# %%
pd.read_parquet(part)[["sample_id", "kappa_phase", "kl_clean_pert", "flip_rate"]].head()

# %% [markdown]
# ## A run again
#
# Every file is compared with its checksum first. Then the tables are those that were exported.

# %%
back = dp.ingest("my-dataset", out="elsewhere")
pd.testing.assert_frame_equal(back.samples, run.samples)
pd.testing.assert_frame_equal(back.depths, run.depths)
back

# %% [markdown]
# ## Without the texts
#
# For prompts that nobody else may read. Texts become hashes, states and everything with a row per token stay out,
# because whoever has the model could find the tokens from them. What was removed is listed.

# %%
hidden = run.export("csv", "redacted", redact_text=True)
for remark in hidden.remarks:
    print("-", remark)
print(sorted(p.name for p in Path("redacted").iterdir()))

# %% [markdown]
# ## Before you publish
#
# - No licence is assumed. Without `licence=` the page says that none was given; texts that a model wrote fall under
#   its terms.
# - Redaction removes what this library knows of. A hash can still confirm a guess.
# - `dynprobe export RUN my-dataset --push me/my-run` sends it to the hub, private unless you say `--public`. The
#   token is the hub client's own business and is never stored.

"""What did this tuning change inside my language model, and how sure are we?

Importing the package stays light: Snakemake parses the Snakefile, and with it `rlsae.config`, for every cluster job.
"""

__version__ = "0.1.0"

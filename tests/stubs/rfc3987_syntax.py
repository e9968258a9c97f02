"""Found instead of the installed module, which compiles a grammar when it is imported: 2 s of CPU in each process.

jsonschema imports it to check one format of addresses, which nothing here uses, and works without it. Ray starts a
dozen processes that import jsonschema, and papermill and nbconvert import it too.
"""

raise ImportError(__doc__)

"""The documentation as a site: `make docs`, which also runs the notebooks.

Without `-D nb_execution_mode=force` they stand there without outputs.
"""

import os
import pathlib

project = 'codistill_jax'
html_title = project
html_theme = 'furo'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_heading_anchors = 3
exclude_patterns = ['_build']

nb_execution_mode = 'off'
nb_execution_timeout = 300  # Seconds a cell; it takes a few.
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = 'remove'  # A progress bar is for who waits.
# They run what is in this clone, whatever is installed.
os.environ['PYTHONPATH'] = str(pathlib.Path(__file__).resolve().parents[1])

autodoc_default_options = {'members': True}
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
add_module_names = False
default_role = 'code'
napoleon_use_ivar = True


def _as_written(app, what, name, obj, options, lines):
  """Takes |x| for what it says, and of a module its first paragraph."""
  if what == 'module' and '' in lines:
    del lines[lines.index('') :]
  lines[:] = [line.replace('|', r'\|').replace('**', r'\*\*') for line in lines]


def _is_field(app, what, name, obj, skip, options):
  """Leaves out fields of named tuples, which the class describes."""
  return True if type(obj).__name__ == '_tuplegetter' else None


def setup(app):
  app.connect('autodoc-skip-member', _is_field)
  app.connect('autodoc-process-docstring', _as_written, priority=900)

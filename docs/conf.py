"""The documentation as a site: `make docs`."""

project = 'codistill_jax'
html_title = project
html_theme = 'furo'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # tests/notebooks_test.py runs them.

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

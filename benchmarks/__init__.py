"""What steps and answers cost, measured. docs/performance.md has the commands and their figures.

Measured under the settings of the CPU libraries that the entry scripts have; they must stand before torch is loaded.
"""

from llama.machine import prepare_libraries

prepare_libraries()

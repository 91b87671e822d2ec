"""The report's figures, a module for each kind; drawn by matplotlib in colours that the page or a file gives them."""

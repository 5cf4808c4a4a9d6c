"""The parts of the report's page: markup, figures as inline SVG, and one module per section."""

"""One static page, made from records: what was compared, who leads, and whether it can be believed; docs/page.md."""

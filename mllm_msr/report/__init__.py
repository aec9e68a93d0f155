"""One HTML file that shows a run: data, results, training, scores, studies and single stories.

``page.py`` puts it together; a module for each section reads what it shows. The file needs nothing
but itself: images are data URIs, charts inline SVG, and a Content-Security-Policy forbids scripts
and every request.
"""

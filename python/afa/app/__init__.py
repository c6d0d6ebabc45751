"""`afa app`: a page in the browser to try a model on a photograph.

analysis    what the page shows, without the page
page        the page itself (Gradio)
"""

"""Folders of image files: preprocessing, class folders, masks and boxes."""

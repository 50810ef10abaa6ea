"""MS-COCO with VOC's classes."""

"""What a rank says of an error that is the user's to mend."""

import pytest
from torch.utils.data import DataLoader, Dataset

from vlmcore.errors import DataError
from vlmcore.training.main import sentence

TEXT = "1000 samples in a row cannot be trained on: too_long.\n  Raise max_length"


class Bad(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        try:
            raise ValueError("24 tokens")
        except ValueError as error:
            raise DataError(TEXT) from error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_loaders_process_is_said_without_its_traceback(num_workers: int) -> None:
    with pytest.raises(DataError) as found:
        next(iter(DataLoader(Bad(), num_workers=num_workers)))
    assert ("Traceback" in str(found.value)) == bool(num_workers)
    assert sentence(found.value) == TEXT

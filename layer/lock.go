package layer

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Lock takes a layer's folder for this process until the file is closed; what is how
// errors call it. It returns ErrInUse while somebody has it.
func Lock(what, path string) (*os.File, error) {
	folder, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", what, err)
	}
	err = syscall.Flock(int(folder.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = ErrInUse
	}
	if err != nil {
		folder.Close()
		return nil, fmt.Errorf("lock %s %s: %w", what, path, err)
	}
	return folder, nil
}

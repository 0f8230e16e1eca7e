package need

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func TestWhatAFailedLoadNeeds(t *testing.T) {
	for what, err := range map[string]error{
		"*need.Privilege": fmt.Errorf("map create: %w", unix.EPERM),
		"*need.Feature":   fmt.Errorf("program: %w", &ebpf.VerifierError{Cause: unix.EINVAL}),
		"*fmt.wrapError":  fs.ErrNotExist,
	} {
		got := Loading("load it", "Linux 5.15", err)
		if fmt.Sprintf("%T", got) != what {
			t.Errorf("%v: %T %v", err, got, got)
		}
	}
	if err := Loading("load it", "Linux 5.15", fs.ErrNotExist); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cause is lost: %v", err)
	}
}

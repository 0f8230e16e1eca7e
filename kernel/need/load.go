package need

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Loading turns the error with which eBPF programs were not loaded into what the user can
// do about it. Since is what it takes: "Linux 5.15 with CONFIG_BPF_SYSCALL".
func Loading(act, since string, err error) error {
	var refused *ebpf.VerifierError
	switch {
	case errors.Is(err, unix.EPERM):
		return &Privilege{Act: act, Capabilities: []string{"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"}}
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSYS), errors.As(err, &refused):
		return &Feature{Act: act, Feature: fmt.Sprintf("support for that (%v)", err), Since: since}
	}
	return fmt.Errorf("%s: %w", act, err)
}

package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// Whatever runs inside a namespace, the process as others see it stays outside.
func TestTheProcessStaysWhereItIs(t *testing.T) {
	needsRoot(t)
	home := namespaceOf(t, "/proc/self/ns/net")
	path := filepath.Join(t.TempDir(), "deep", "net")
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	defer Remove(path)
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			err := Do(path, func() error {
				if inside := namespaceOf(t, "/proc/thread-self/ns/net"); inside == home {
					return errors.New("not inside")
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if now := namespaceOf(t, "/proc/self/ns/net"); now != home {
		t.Errorf("the process's first thread is in %s, it was in %s", now, home)
	}
	if outside := namespaceOf(t, "/proc/thread-self/ns/net"); outside != home {
		t.Errorf("this thread is in %s, it was in %s", outside, home)
	}
}

func TestAFunctionThatEndsItsGoroutineIsAnError(t *testing.T) {
	needsRoot(t)
	path := filepath.Join(t.TempDir(), "net")
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	defer Remove(path)
	if err := Do(path, func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error")
	}
}

func TestErrorsNameTheNamespace(t *testing.T) {
	needsRoot(t)
	if err := Do("/absent/net", func() error { return nil }); err == nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Do: %v", err)
	}
	if err := Remove("/absent/net"); err != nil {
		t.Errorf("removing what is not there: %v", err)
	}
	path := filepath.Join(t.TempDir(), "net")
	if err := Create(path); err != nil {
		t.Fatal(err)
	}
	defer Remove(path)
	if err := Create(path); !errors.Is(err, os.ErrExist) {
		t.Errorf("Create over another: %v", err)
	}
	err := Do(path, func() error { return SetSysctl("net.ipv4.ip_forward", "1") })
	if err != nil {
		t.Error(err)
	}
	if err := SetSysctl("net.ipv4.absent", "1"); err == nil {
		t.Error("setting what is not there: no error")
	}
}

func namespaceOf(t *testing.T, path string) string {
	t.Helper()
	name, err := os.Readlink(path)
	if err != nil {
		return fmt.Sprint(err)
	}
	return name
}

package layer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// part is something that goes, or says why it does not.
type part struct {
	name string
	err  error
}

func (p part) Object() string { return p.name }
func (p part) Detail() string { return "" }
func (p part) Remove() error  { return p.err }

func TestWhatFailsToGoDoesNotStopTheOthers(t *testing.T) {
	busy := errors.New("busy")
	done, err := Changes{Gone(part{"a", nil}), Gone(part{"b", busy}), Gone(part{"c", nil})}.Remove()
	if !errors.Is(err, busy) || fmt.Sprint(done) != "[- a - c]" {
		t.Errorf("%v, %v", done, err)
	}
}

func TestPinsThatAreOursGo(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "pins")
	ours := func(name string) bool { return !strings.HasPrefix(name, "strange") }
	if none, err := PinsGone(folder, ours); err != nil || none != nil {
		t.Errorf("no folder: %v, %v", none, err)
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"homes", "link_from_pod_3", "next_link_to_pod_3", "strange"} {
		if err := os.WriteFile(filepath.Join(folder, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct{ what, want string }{
		{"beside what is somebody's", "[- pin link_from_pod_3 - pin next_link_to_pod_3 - pin homes]"},
		{"again", "[]"},
		{"alone", "[- pin pins]"},
	} {
		if step.what == "alone" {
			if err := os.Remove(filepath.Join(folder, "strange")); err != nil {
				t.Fatal(err)
			}
		}
		changes, err := PinsGone(folder, ours)
		if err == nil {
			_, err = changes.Remove()
		}
		text := strings.ReplaceAll(strings.ReplaceAll(fmt.Sprint(changes), folder+"/", ""), filepath.Dir(folder)+"/", "")
		if err != nil || text != step.want {
			t.Errorf("%s: %s, not %s: %v", step.what, text, step.want, err)
		}
	}
	if _, err := os.Stat(folder); !os.IsNotExist(err) {
		t.Errorf("the folder: %v", err)
	}
}

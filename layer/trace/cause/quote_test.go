package cause

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestQuote(t *testing.T) {
	for name, want := range map[string]string{
		"eth0.100": "eth0.100", "/run/netns/cni-4f": "/run/netns/cni-4f", ";reboot;": "';reboot;'", "a'b": `'a'\''b'`, "$(id)": "'$(id)'", "a b": "'a b'",
	} {
		if got := Quote(name); got != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
}

// A device of a recorded run gets a name that does harm: no command gives it to a shell.
func TestNamesAreQuotedInCommands(t *testing.T) {
	const evil = ";reboot;#'"
	quotedNames := 0
	files, _ := filepath.Glob("testdata/*.json")
	for _, name := range files {
		for _, v := range Diagnose(load(t, name)) {
			if v.Where.Interface == "" || !strings.Contains(v.Fix+v.Undo, v.Where.Interface) {
				continue
			}
			for _, v := range Diagnose(renamed(t, name, v.Where.Interface, evil)) {
				for _, text := range []string{v.Fix, v.Undo} {
					quotedNames += strings.Count(text, Quote(evil))
					if left := strings.ReplaceAll(text, Quote(evil), ""); strings.Contains(left, "reboot") {
						t.Errorf("%s: %s: %s", name, v.Cause, text)
					}
				}
			}
		}
	}
	if quotedNames == 0 {
		t.Error("no command with a device: the test is blind")
	}
}

// renamed is a recorded run in which a device has another name.
func renamed(t *testing.T, file, device, name string) *Evidence {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := json.Marshal(name)
	e := &Evidence{}
	if err := json.Unmarshal([]byte(strings.ReplaceAll(string(raw), `"`+device+`"`, string(text))), e); err != nil {
		t.Fatal(err)
	}
	return e
}

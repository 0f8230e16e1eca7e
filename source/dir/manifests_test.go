package dir

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/millrace/millrace/model"
)

var update = flag.Bool("update", false, "write the dumps in testdata anew")

// TestManifests reads each folder in testdata and compares what the Snapshot
// says. The file "want" is the dump, all others are manifests.
func TestManifests(t *testing.T) {
	stories, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(stories) == 0 {
		t.Fatalf("no stories in testdata: %v", err)
	}
	for _, path := range stories {
		abs, err := filepath.Abs(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) { story(t, abs) })
	}
}

func story(t *testing.T, path string) {
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	want := -1
	for i, f := range archive.Files {
		if f.Name == "want" {
			want = i
			continue
		}
		write(t, f.Name, string(f.Data))
	}
	if want < 0 {
		t.Fatalf("%s has no file want", path)
	}
	got := dump(readAll(t, "."))
	if *update {
		archive.Files[want].Data = []byte(got)
		if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want := string(archive.Files[want].Data); got != want {
		t.Errorf("the manifests %s\nsay\n%s\nand should say\n%s", path, got, want)
	}
}

func readAll(t testing.TB, path string) *model.Snapshot {
	t.Helper()
	s, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Complete {
		t.Fatal("what Read gives is not complete")
	}
	return s
}

// write puts a file in place at once, as Kubernetes' and our own writers do.
func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(filepath.Dir(path), ".half")
	if err := os.WriteFile(half, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(half, path); err != nil {
		t.Fatal(err)
	}
}

// TestOnlineBoutique reads Google's example shop where a copy of its manifests is
// at hand.
func TestOnlineBoutique(t *testing.T) {
	path := os.Getenv("MILLRACE_ONLINE_BOUTIQUE")
	if path == "" {
		t.Skip("MILLRACE_ONLINE_BOUTIQUE names no copy of the manifests")
	}
	s := readAll(t, path)
	if len(s.Services) != 12 || len(s.Workloads) != 12 || len(s.Problems) != 0 {
		t.Errorf("the shop has 12 Services and 12 Deployments and nothing wrong, but reads as\n%s", dump(s))
	}
}

func TestOpenMissing(t *testing.T) {
	t.Chdir(t.TempDir())
	_, err := Open("shop")
	if want := "open manifests shop: no such file or directory: give a manifest file or a folder of them"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

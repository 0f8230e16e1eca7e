package corefile

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy/caddyfile"
	"golang.org/x/tools/txtar"

	"github.com/millrace/millrace/model"
)

// said is what was read, in lines.
func said(d *model.DNS) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s, %v", d.Zone, d.TTL)
	if d.Reverse {
		text.WriteString(", addresses too")
	}
	if d.Left != "" {
		fmt.Fprintf(&text, ", left: %s", d.Left)
	}
	for _, f := range d.Forwards {
		fmt.Fprintf(&text, "\n  %s ->", f.Zone)
		for _, up := range f.To {
			switch {
			case up.File != "":
				fmt.Fprintf(&text, " file %s", up.File)
			case up.ServerName != "":
				fmt.Fprintf(&text, " tls %v as %s", up.Address, up.ServerName)
			case up.TCP:
				fmt.Fprintf(&text, " tcp %v", up.Address)
			default:
				fmt.Fprintf(&text, " %v", up.Address)
			}
		}
		if f.Left != "" {
			fmt.Fprintf(&text, " left: %s", f.Left)
		}
	}
	if len(d.Hosts)+len(d.HostAddresses) > 0 {
		fmt.Fprintf(&text, "\n  hosts %v %v", d.Hosts, d.HostAddresses)
	}
	return text.String() + "\n"
}

func TestCorefiles(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/corefiles.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, file := range archive.Files {
		fmt.Fprintf(&got, "%s: %s", file.Name, said(Read(string(file.Data), Files{})))
	}
	compareGolden(t, "testdata/corefiles.golden", got.String())
}

func compareGolden(t *testing.T, golden, got string) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("read:\n%s\nnot (UPDATE_GOLDEN=1 writes it):\n%s", got, want)
	}
}

// Snippets in snippets come to an end, soon.
func TestSnippetsEnd(t *testing.T) {
	for name, text := range map[string]string{
		"itself": "(a) {\nimport a\n}\n. {\nkubernetes cluster.local\nimport a\n}",
		"two":    "(a) {\nimport b\n" + strings.Repeat("x ", 4000) + "\n}\n(b) {\nimport a\n" + strings.Repeat("x ", 4000) + "\n}\n. {\nimport a\n}",
		"many":   "(a) {\n}\n. {\nkubernetes cluster.local\n" + strings.Repeat("import a\n", 3000) + "}",
		"words":  ". {\nkubernetes cluster.local\nwhoami " + strings.Repeat("x ", 1<<16) + "\n}",
	} {
		begun := time.Now()
		d := Read(text, Files{})
		if !strings.Contains(d.Left, "there are more than") {
			t.Errorf("%s: %s", name, said(d))
		}
		if took := time.Since(begun); took > 20*time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
}

// No file is opened and no variable read, whatever the text says.
func TestNothingElseIsRead(t *testing.T) {
	t.Setenv("ZONE", "cluster.local")
	d := Read(".:53 {\nkubernetes cluster.local\nimport corefile_test.go\nforward . 192.0.2.1\n}", Files{})
	if !strings.Contains(d.Left, "import corefile_test.go") || len(d.Forwards) != 1 || d.Forwards[0].Left != d.Left {
		t.Error(said(d))
	}
	if d := Read(".:53 {\nkubernetes {%ZONE%}\n}", Files{}); d.Zone != "" || !strings.Contains(d.Left, "environment") {
		t.Error(said(d))
	}
}

// FuzzRead looks for texts that stop the reader, or of which it says what cannot be.
func FuzzRead(f *testing.F) {
	archive, err := txtar.ParseFile("testdata/corefiles.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		f.Add(string(file.Data))
	}
	f.Fuzz(func(t *testing.T, text string) {
		d := Read(text, Files{})
		if d.Left == "" && (d.Zone == "" || d.TTL < 0 || d.TTL > time.Hour) {
			t.Errorf("%q: %s", text, said(d))
		}
		if n := len(d.Forwards); n == 0 || d.Forwards[n-1].Zone != "." {
			t.Errorf("%q: nobody for the rest: %s", text, said(d))
		}
		seen := map[string]bool{}
		for _, f := range d.Forwards {
			if seen[f.Zone] || (f.Left == "") != (len(f.To) > 0) {
				t.Errorf("%q: %s", text, said(d))
			}
			seen[f.Zone] = true
			if d.Left == "" && f.Left == "" && within(f.Zone, d.Zone) {
				t.Errorf("%q: the cluster's zone is forwarded: %s", text, said(d))
			}
			for _, up := range f.To {
				if up.Address.IsValid() == (up.File != "") {
					t.Errorf("%q: %s", text, said(d))
				}
			}
		}
		if again := said(Read(text, Files{})); again != said(d) {
			t.Errorf("%q: once %s, then %s", text, said(d), again)
		}
	})
}

// FuzzParse looks for texts that are grouped otherwise than CoreDNS' own parser does. Of
// those that it refuses nothing is used; more may be refused.
func FuzzParse(f *testing.F) {
	archive, err := txtar.ParseFile("testdata/corefiles.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		f.Add(string(file.Data))
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "import") {
			return // their parser would open files
		}
		ours, err := parse(text, &Files{})
		if err != nil {
			return
		}
		theirs, err := caddyfile.Parse("Corefile", strings.NewReader(text), nil)
		if err != nil {
			t.Fatalf("%q: CoreDNS refuses it: %v", text, err)
		}
		if got, want := groupedAll(ours.blocks), groupedAllByThem(theirs); !slices.Equal(got, want) {
			t.Errorf("%q is\n%q, and CoreDNS reads\n%q", text, got, want)
		}
	})
}

// grouped is a server block without its braces, by the names of plugins.
func grouped(b block) string {
	of := map[string][]string{}
	for _, d := range b.directives {
		words := append([]string{d.name}, d.args...)
		for _, line := range d.body {
			words = append(words, line.words...)
		}
		of[d.name] = append(of[d.name], words...)
	}
	var keys []string
	for _, key := range b.keys {
		keys = append(keys, key.text)
	}
	return inOrder(keys, of)
}

func groupedByThem(b caddyfile.ServerBlock) string {
	of := map[string][]string{}
	for name, tokens := range b.Tokens {
		for _, token := range tokens {
			of[name] = append(of[name], token.Text)
		}
	}
	return inOrder(b.Keys, of)
}

func inOrder(keys []string, of map[string][]string) string {
	text := fmt.Sprintf("%q", keys)
	for _, name := range slices.Sorted(maps.Keys(of)) {
		words := slices.DeleteFunc(of[name], func(word string) bool { return word == "{" || word == "}" })
		text += fmt.Sprintf(" %q", words)
	}
	return text
}

func BenchmarkRead(b *testing.B) {
	archive, err := txtar.ParseFile("testdata/corefiles.txtar")
	if err != nil {
		b.Fatal(err)
	}
	text := string(archive.Files[0].Data)
	for b.Loop() {
		Read(text, Files{})
	}
}

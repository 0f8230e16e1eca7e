package dir

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

// FuzzDecode reads any bytes as a manifest. It must not panic, must not take
// more memory than the input explains, and must say where each problem is.
func FuzzDecode(f *testing.F) {
	stories, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range stories {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range txtar.Parse(data).Files {
			f.Add(file.Data, strings.HasSuffix(file.Name, ".json"))
			for _, c := range split(file.Data) {
				f.Add(c.text, false)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, isJSON bool) {
		name := "f.yaml"
		if isJSON {
			name = "f.json"
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		all := newFiles()
		all.put(name, data, stamp{})
		runtime.ReadMemStats(&after)
		if used, allowed := after.TotalAlloc-before.TotalAlloc, uint64(256<<20+len(data)*20_000); used > allowed {
			t.Errorf("%d bytes of input took %d bytes of memory, more than %d", len(data), used, allowed)
		}
		s := all.cluster.Snapshot()
		if s.Unread > 0 && len(s.Problems) == 0 {
			t.Errorf("%d are unread and no problem says why", s.Unread)
		}
		for _, p := range s.Problems {
			if !strings.HasPrefix(p.Where, name) || p.Text == "" {
				t.Errorf("a problem does not say where or what: %+v", p)
			}
		}
	})
}

// TestBombs reads small files that mean to be large ones.
func TestBombs(t *testing.T) {
	aliases := "a: &a [" + strings.Repeat("x,", 1000) + "]\n"
	for c := 'b'; c < 'i'; c++ {
		aliases += string(c) + ": &" + string(c) + " [" + strings.Repeat("*"+string(c-1)+",", 1000) + "]\n"
	}
	pod := "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"
	merges := "m0: &m0 {a: 1}\n"
	for c := '1'; c < '9'; c++ {
		merges += "m" + string(c) + ": &m" + string(c) + " {<<: [" + strings.Repeat("*m"+string(c-1)+",", 100) + "]}\n"
	}
	for name, data := range map[string]string{
		"aliases":         pod + aliases,
		"aliases in list": "apiVersion: v1\nkind: List\nx: &x " + strings.Repeat("y", 1<<20) + "\nitems:\n" + strings.Repeat("- {apiVersion: v1, kind: Pod, a: *x}\n", 1000),
		"merges":          pod + merges,
		"deep flow":       pod + "spec: " + strings.Repeat("[", 9000),
		"deep blocks":     pod + "spec:\n" + strings.Repeat("- ", 5000),
		"containers":      pod + "spec: {containers: [" + strings.Repeat("{},", 300_000) + "]}\n",
		"values":          pod + "spec: [" + strings.Repeat(",", 2_000_000) + "]\n",
		"json depth":      `{"kind":"Pod","apiVersion":"v1","metadata":` + strings.Repeat("[", 100_000),
		"json containers": `{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p"},"spec":{"containers":[` + strings.Repeat("{},", 300_000) + `{}]}}`,
		"objects":         strings.Repeat("{}", MaxObjects+2),
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			got := decode(map[bool]string{true: "f.json", false: "f.yaml"}[data[0] == '{'], []byte(data))
			runtime.ReadMemStats(&after)
			if got.unread == 0 || len(got.problems) == 0 || len(got.problems) > maxProblems+1 {
				t.Errorf("%d problems, %d parts unread", len(got.problems), got.unread)
			}
			if used := (after.TotalAlloc - before.TotalAlloc) >> 20; used > 1500 {
				t.Errorf("%d bytes took %d MiB of memory", len(data), used)
			} else {
				t.Logf("%d bytes took %d MiB: %v", len(data), used, got.problems[0])
			}
		})
	}
}

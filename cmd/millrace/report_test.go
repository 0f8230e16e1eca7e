package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace/millrace/doctor/pack"
)

// The archive has what the agent says and what is in force, as JSON that reads.
func TestReport(t *testing.T) {
	needsRoot(t)
	n := newNode(t)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.10", "10.244.9.2"))
	n.start()
	file := filepath.Join(t.TempDir(), "report.tar.gz")
	stdout, stderr, status := n.inside("report", file, "--run", n.run, "--pins", n.pins, "-o", "json")
	var contents pack.Contents
	if err := json.Unmarshal([]byte(stdout), &contents); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v: %s", status, err, stderr)
	}
	for _, f := range contents.Files {
		if f.Error != "" && f.Name != "counters.txt" || f.Bytes == 0 {
			t.Errorf("%s: %d bytes, %s", f.Name, f.Bytes, f.Error)
		}
	}
	archive, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	z, err := gzip.NewReader(archive)
	if err != nil {
		t.Fatal(err)
	}
	read := map[string]any{}
	for r := tar.NewReader(z); ; {
		header, err := r.Next()
		if err != nil {
			break
		}
		if name, found := strings.CutSuffix(filepath.Base(header.Name), ".json"); found {
			var content any
			if err := json.NewDecoder(r).Decode(&content); err != nil {
				t.Errorf("%s: %v", header.Name, err)
			}
			read[name] = content
		}
	}
	services, _ := json.Marshal(read["show-services"])
	if status, _ := read["status"].(map[string]any); status["ready"] != true || !strings.Contains(string(services), "10.96.0.10") {
		t.Errorf("status %v, services %s", status, services)
	}

	// What is there is not written over.
	if _, stderr, status := n.inside("report", file); status != exitFailed || !strings.Contains(stderr, "file exists") {
		t.Errorf("onto a file that is there: exit status %d, %q", status, stderr)
	}
}

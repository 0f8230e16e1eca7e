// Package examples holds manifests that show what millrace does. They are part
// of the binary, so that `millrace demo` needs no files.
package examples

import _ "embed" // for the manifests

// Shop is a cluster of sixteen Services, as YAML.
//
//go:embed shop.yaml
var Shop []byte
